"""Plays a plan on a schedule and judges what came of it: every result and every error, what was left behind, and how
much was sent."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from mpiddp.collectives.base import ReduceOp
from mpiddp.engine import Handle, Kind, Signature, lane, meet, member, starting, wire
from mpiddp.errors import CollectiveError, MismatchError, RankLeftError
from tests import naive
from tests.playing import Brittle, Player, bucket
from tests.programs import Cycle, Group, Op, Plan
from tests.simulated_world import World

__all__ = ["check"]


def check(plan: Plan, seed: int) -> None:
    """Play ``plan`` on the schedule of ``seed``, and look at everything that came of it."""
    draw = random.Random(seed)
    with _narrow(draw) as patch:
        world = World(
            plan.size,
            seed,
            fusion_nbytes=draw.choice((0, 16, 64, 1 << 20)),
            teams=plan.teams[1:],
            segment_nbytes=draw.choice((8, 64)),
            is_buffering=draw.random() < 0.3,
            shares_memory=draw.random() < 0.4,
        )
        patch.setattr(meet, "time", SimpleNamespace(monotonic=lambda: world.clock))
        patch.setattr(meet, "_ALONE_S", draw.choice((-1.0, 5.0, 50.0)))
        players = [Player(world, plan, rank, seed) for rank in range(plan.size)]
        world.play({player.rank: player.play() for player in players})
        world.close()
    for epoch, items in enumerate(plan.epochs):
        for index, item in enumerate(items.items):
            _check_item(plan, players, (epoch, index), item)
    _check_joins(plan, players)
    _check_nothing_is_left(plan, world)
    _check_messages(plan, world, players)


@contextmanager
def _narrow(draw: random.Random) -> Iterator[pytest.MonkeyPatch]:
    """Limits so low that they are reached: exchanges at a time, tags, tags of a lane, entries of the table."""
    running = draw.choice((1, 2, 16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(starting, "_RUNNING", running)
        patch.setattr(starting, "FIRST_TAG", draw.choice((running, running + 3, 8192)))
        patch.setattr(lane, "LANE_TAGS", draw.choice((1, 3, 512)))
        patch.setattr(member, "TABLE_ENTRIES", draw.choice((1, 3, 4096)))
        yield patch


# -- what came of it ---------------------------------------------------------------------------------------------------


def _check_item(plan: Plan, players: list[Player], place: tuple[int, int], item: Op | Group | Cycle) -> None:
    present = plan.present(*place)
    members = plan.members(item.team)
    left = [rank for rank in members if rank not in present] if plan.has_left(place[0]) else []
    for rank in present:
        assert all(handle.done for handle in players[rank].handles[place]), f"{place} is not done on rank {rank}"
    if left:
        if members[0] in plan.hasty:
            left.append(members[0])  # the coordinator, which did not wait for the others
        if isinstance(item, Group) and item.shorter is not None:
            left.append(members[item.shorter % len(members)])  # it may go without the last of its group
        for rank in present:
            for handle in players[rank].handles[place]:
                _check_left(handle, left)
    elif isinstance(item, Cycle):
        _check_cycle(players, place, item, present)
    else:
        _check_operations(plan, players, place, item, present)


def _check_left(handle: Handle, left: list[int]) -> None:
    assert isinstance(handle.error, RankLeftError), (handle, handle.error)
    assert any(f"rank {rank} " in str(handle.error) for rank in left) and "left" in str(handle.error), handle.error


def _check_cycle(players: list[Player], place: tuple[int, int], cycle: Cycle, present: tuple[int, ...]) -> None:
    number = 100 * place[0] + place[1]
    for index, numel in enumerate(cycle.buckets):
        expected = sum((bucket(number, index, numel, rank) for rank in present), torch.zeros(numel))
        for rank in present:
            assert players[rank].handles[place][index].error is None
            assert torch.equal(players[rank].results[place][index], expected), (place, index, rank)


def _check_operations(
    plan: Plan, players: list[Player], place: tuple[int, int], item: Op | Group, present: tuple[int, ...]
) -> None:
    """A group in which anything differs fails as a whole."""
    members = plan.members(item.team)
    ops = item.ops if isinstance(item, Group) else (item,)
    sizes = dict.fromkeys(present, len(ops))
    if isinstance(item, Group) and item.shorter is not None and members[item.shorter % len(members)] in present:
        sizes[members[item.shorter % len(members)]] -= 1
    handles = [handle for rank in present for handle in players[rank].handles[place]]
    wrong = []
    for op in ops:
        groups = {rank: (item.name or "", sizes[rank]) if isinstance(item, Group) else () for rank in present}
        signatures = {rank: naive.signature(plan, naive.as_submitted(plan, op, rank), groups[rank]) for rank in present}
        if len(set(signatures.values())) > 1:
            wrong.append(signatures)
    if wrong:
        for handle in handles:
            if isinstance(handle.error, RankLeftError) and (members[0] in plan.hasty or len(set(sizes.values())) > 1):
                continue  # the coordinator, or a rank without the whole group, went before all of it had come
            assert isinstance(handle.error, MismatchError), (handle, handle.error)
            assert item.name is None or f"'{item.name}" in str(handle.error)
            assert any(_says(str(handle.error), signatures) for signatures in wrong), (handle.error, wrong)
        return
    for at, op in enumerate(ops[: min(sizes.values(), default=0)]):
        number = 100 * place[0] + place[1] + 20 * (at + 1 if isinstance(item, Group) else 0)
        _check_operation(plan, op, number, {rank: players[rank].handles[place][at] for rank in present})


def _says(text: str, signatures: dict[int, Signature]) -> bool:
    """Whether ``text`` names each differing value, and who has it."""
    first = next(iter(signatures.values()))
    fields = {field for signature in signatures.values() for field in first.differing(signature)}
    for field in fields:
        values: dict[str, list[str]] = {}
        for rank in sorted(signatures):
            values.setdefault(signatures[rank].show(field), []).append(str(rank))
        for value, ranks in values.items():
            if f"{value} on rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}" not in text:
                return False
    return True


def _check_operation(plan: Plan, op: Op, number: int, handles: dict[int, Handle]) -> None:
    """One in which all that take part agree."""
    if not handles:
        return
    members = plan.members(op.team)
    submitted = {rank: naive.as_submitted(plan, op, rank) for rank in handles}
    first = next(iter(submitted.values()))
    may_miss = first.kind is Kind.BARRIER or (first.kind is Kind.ALLREDUCE and first.op is ReduceOp.SUM)
    if len(handles) < len(members) and not may_miss:
        for handle in handles.values():
            assert isinstance(handle.error, CollectiveError) and "has joined" in str(handle.error), handle.error
            assert op.name is None or op.name in str(handle.error)
        return
    for rank, handle in handles.items():
        if op.brittle is not None and members[op.brittle % len(members)] == rank:
            assert isinstance(handle.error, Brittle), (handle, handle.error)
        else:
            _check_result(handle, naive.result(plan, submitted[rank], number, list(handles), rank), op)


def _check_result(handle: Handle, expected: object, op: Op) -> None:
    assert handle.error is None, (handle, handle.error)
    if expected is None:
        return
    pairs = zip(handle.result, expected, strict=True) if isinstance(expected, tuple) else [(handle.result, expected)]
    for mine, naively in pairs:
        assert mine.shape == naively.shape and mine.dtype == naively.dtype, (handle, mine, naively)
        if op.op is ReduceOp.ADASUM:
            assert torch.allclose(mine, naively, rtol=1e-5, atol=1e-6), (handle, mine, naively)
        else:
            assert torch.equal(mine, naively), (handle, mine, naively)


def _check_joins(plan: Plan, players: list[Player]) -> None:
    for epoch, answers in enumerate(zip(*(player.joins for player in players), strict=True)):
        counts = plan.epochs[epoch].counts
        assert counts is not None
        for team, members in enumerate(plan.teams):
            requests = [answers[rank][_place_of(players[rank], team)] for rank in members]
            assert [request.error for request in requests] == [None] * len(members)
            last = {request.result for request in requests}
            assert len(last) == 1 and last <= set(members), (epoch, team, last)
    for team, members in enumerate(plan.teams):
        numbers = {players[rank].channels[team].unnamed for rank in members}  # type: ignore[union-attr]
        assert len(numbers) == 1 or plan.leaves, f"the numbers of unnamed operations have parted: {numbers}"


def _place_of(player: Player, team: int) -> int:
    return sum(channel is not None for channel in player.channels[:team])


def _check_nothing_is_left(plan: Plan, world: World) -> None:
    # An exchange that was begun when somebody left can no more be withdrawn.
    has_lost = any(isinstance(item, Cycle) for item in plan.epochs[-1].items) and plan.leaves
    assert has_lost or world.network.idle(), "messages were left behind"
    for channels in world.by_team:
        for rank, own in channels.items():
            # That members have met is of no interest to who knows that all have left.
            arrived = [data for _, data in own.port.arrived if any(item[0] != wire.MET for item in wire.unpack(data))]
            assert rank in plan.hasty or not arrived, f"rank {rank} has not heard {arrived}"
            assert rank in plan.hasty or not (own.running or own.submitted or own.launches)
            assert not own.member.waiting, f"rank {rank} waits for {own.member.waiting}"
            if own.coordinator is not None and not plan.hasty:
                groups = own.coordinator._groups
                assert not own.coordinator.announced and not groups._gathered and not groups.failed


def _check_messages(plan: Plan, world: World, players: list[Player]) -> None:
    """Among N members an operation costs at most 2(N - 1) control messages: one from each member, one to each.

    A rank that joins or leaves costs as many, and one more to each when the last has; where ranks have joined, each
    cycle of a lane may be called by each rank that has begun it, once at its beginning and once at each join, and each
    call is passed on to each that has joined.
    """
    for team, members in enumerate(plan.teams):
        requests = dict.fromkeys(members, 0)
        operations = cycles = joins = 0
        for epoch, items in enumerate(plan.epochs):
            joins += len(members) * (items.counts is not None and not plan.has_left(epoch))
            for index, item in enumerate(items.items):
                if item.team != team:
                    continue
                cycles += isinstance(item, Cycle)
                meets = isinstance(item, Op) and item.meets  # it may be announced, and then withdrawn
                for rank in plan.present(epoch, index):
                    handles = 0 if isinstance(item, Cycle) else len(players[rank].handles[epoch, index])
                    requests[rank] += 2 * handles if meets else handles
                if not isinstance(item, Cycle):
                    operations += len(item.ops) if isinstance(item, Group) else 1
        calls = cycles * (1 + len(members)) if joins else 0
        channels = world.by_team[team]
        for rank in members[1:]:
            ends = 1 + joins // len(members)
            assert channels[rank].port.sent <= requests[rank] + ends + calls
        most = operations + 2 * joins + len(members) + 1 + calls * len(members)
        # Where ranks have left, operations fail one by one.
        most += sum(requests.values()) if plan.leaves else 0
        most += 1 if members[0] in plan.hasty else 0
        assert channels[members[0]].port.sent <= (len(members) - 1) * most
