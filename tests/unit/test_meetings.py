"""Members of a node who wait for an all-reduce meet without a word, and whatever else happens is told as ever."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from mpiddp.collectives.base import ReduceOp
from mpiddp.engine import Handle, Kind, Request, Signature, meet
from mpiddp.engine.stall import StallCheck
from mpiddp.errors import MismatchError, RankLeftError
from mpiddp.transport.session import ARRIVED, STAGED
from tests.simulated_node import nodes
from tests.simulated_world import World


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[World]]:
    """Worlds to be closed; their clock is also that of who waits alone."""
    worlds: list[World] = []
    monkeypatch.setattr(meet, "time", SimpleNamespace(monotonic=lambda: worlds[-1].clock))
    yield worlds
    for world in worlds:
        world.close()


def _world(opened: list[World], size: int, seed: int = 0) -> World:
    opened.append(World(size, seed, shares_memory=True))
    return opened[-1]


def _submit(world: World, rank: int, values: list[float], meets: bool = True) -> Handle:
    channel = world.channels[rank]
    channel.unnamed += 1
    flat = torch.tensor(values)
    signature = Signature(int(Kind.ALLREDUCE), "float32", tuple(flat.shape), int(ReduceOp.SUM))
    return world.submit(rank, channel, Request(channel.unnamed, signature, flat, answer=flat, meets=meets))


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("numel", [1, 100, 60_000])
def test_they_meet_and_no_message_is_sent(
    opened: list[World], monkeypatch: pytest.MonkeyPatch, size: int, numel: int
) -> None:
    monkeypatch.setattr(meet, "_ALONE_S", 1e9)
    for seed in range(2):
        world = _world(opened, size, seed)
        for round_ in range(5):
            handles = [_submit(world, rank, [rank + round_] * numel) for rank in range(size)]
            world.run(handles)
            expected = torch.full((numel,), float(sum(range(size)) + size * round_))
            assert all(torch.equal(handle.result, expected) for handle in handles)
        assert world.network.idle() and not any(port.sent for port in world.ports)
        assert [channel.steps for channel in world.channels] == [5] * size


def test_whoever_comes_late_meets_who_was_announced(opened: list[World], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meet, "_ALONE_S", -1.0)
    world = _world(opened, 3)
    coordinator = world.channels[0].coordinator
    assert coordinator is not None
    early = [_submit(world, rank, [1.0]) for rank in (0, 1)]
    with pytest.raises(AssertionError):  # a deadlock: rank 2 does not come
        world.run(early)
    assert list(coordinator.announced) == [1] and coordinator.announced[1].numbers.keys() == {0, 1}
    late = _submit(world, 2, [1.0])
    world.run([*early, late])
    assert [handle.result.tolist() for handle in (*early, late)] == [[3.0]] * 3
    assert not any(channel.pending for channel in world.channels)  # what waited for it may remove the process set
    for _ in range(3):
        for engine in world.engines:
            engine.listen()
        while world._events:
            world._next()
    assert not coordinator.announced and not any(channel.member.waiting for channel in world.channels)


@pytest.mark.parametrize("late", [0, 1])
def test_one_does_not_wait(opened: list[World], monkeypatch: pytest.MonkeyPatch, late: int) -> None:
    monkeypatch.setattr(meet, "_ALONE_S", 5.0)
    for seed in range(20):
        world = _world(opened, 2, seed)
        handles = [_submit(world, rank, [1.0, 2.0], meets=rank != late) for rank in range(2)]
        handles += [_submit(world, rank, [3.0]) for rank in range(2)]
        world.run(handles)
        assert [handle.result.tolist() for handle in handles] == [[2.0, 4.0]] * 2 + [[6.0]] * 2


def test_what_differs_is_an_error_and_the_next_is_not(opened: list[World], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meet, "_ALONE_S", 5.0)
    for seed in range(20):
        world = _world(opened, 3, seed)
        bad = [_submit(world, rank, [1.0] * (1 + (rank == 1))) for rank in range(3)]
        world.run(bad)
        assert all(isinstance(handle.error, MismatchError) for handle in bad)
        assert "(2,) on rank 1" in str(bad[0].error)
        good = [_submit(world, rank, [1.0]) for rank in range(3)]
        world.run(good)
        assert [handle.result.tolist() for handle in good] == [[3.0]] * 3


def test_one_has_left(opened: list[World], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meet, "_ALONE_S", 5.0)
    world = _world(opened, 2)
    world.channels[0].leave(0)
    handle = _submit(world, 1, [1.0])
    world.run([handle])
    assert isinstance(handle.error, RankLeftError) and "rank 0" in str(handle.error)


def test_it_is_no_exchange_that_does_not_move(opened: list[World], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meet, "_ALONE_S", 1e9)
    world = _world(opened, 2)
    _submit(world, 0, [1.0])
    channel = world.channels[0]
    world.engines[0].push()
    assert len(channel.running) == 1 and not channel.running[0].is_begun
    check = StallCheck(world.engines[0], world.engines[0].presence, 0.001, 0.0)
    assert not list(check._unmoved(channel, {}, 1e9))


def test_counters_of_a_later_meeting_do_not_count() -> None:
    """A peer that did number 1 otherwise, and has published number 3 in the same slot, has not come to number 1."""
    first, second = nodes(2)
    for node in (first, second):
        node.memory.close()
    later = second.meet(3, 7)
    assert later is not None
    for counter in (ARRIVED, STAGED):
        later.count(counter, 5)
    mine = first.meet(1, 7)
    assert mine is not None
    assert not mine.have(ARRIVED, 1) and not mine.has(1, STAGED, 1) and not mine.has_met()
    assert first.meet(3, 7) is None  # the slot is in use
    with pytest.raises(KeyError), mine:
        raise KeyError
    again = first.meet(3, 8)
    assert again is not None and not again.has_met()  # it is something else
    with pytest.raises(KeyError), again:
        raise KeyError
    same = first.meet(3, 7)
    assert same is not None and same.has_met() and same.have(ARRIVED, 5) and not same.have(ARRIVED, 6)
