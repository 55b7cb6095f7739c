"""A rank of a plan: submits, waits, joins and leaves, as a generator that a simulated world resumes."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import torch

from mpiddp.collectives import ring, select
from mpiddp.collectives.base import ReduceOp
from mpiddp.engine import Channel, Handle, Key, Kind, Lane, Request, Signature, eager, may_meet
from mpiddp.transport.base import Link, Steps
from tests import naive
from tests.programs import Cycle, Group, Item, Op, Plan
from tests.simulated_world import Program, World

__all__ = ["Brittle", "Player", "bucket"]

_Place = tuple[int, int]  # epoch, index of the item


class Brittle(Exception):
    """What a delivery raises on purpose."""


def bucket(number: int, index: int, numel: int, rank: int) -> torch.Tensor:
    """What a rank contributes to a bucket of a cycle."""
    return torch.tensor([float((number + 3 * index + rank * (i + 1)) % 5) for i in range(numel)])


class Player:
    """Its order, and where it waits, is drawn from ``seed``. ``handles`` holds what it submitted, by item."""

    def __init__(self, world: World, plan: Plan, rank: int, seed: int) -> None:
        self.world, self.plan, self.rank = world, plan, rank
        self.engine = world.engines[rank]
        self.random = random.Random(f"{plan.order} {seed} {rank}")
        self.channels: list[Channel | None] = [channels.get(rank) for channels in world.by_team]
        self.lanes = {
            (team, number): channel.lane() for team, channel in enumerate(self.channels) if channel for number in (0, 1)
        }
        self.handles: dict[_Place, list[Handle]] = {}
        self.results: dict[_Place, list[torch.Tensor]] = {}  # of cycles
        self.joins: list[list[Request]] = []
        self._todo: list[_Place] = []  # of this epoch, in order
        self._outstanding: list[_Place] = []
        self._latest: dict[Any, _Place] = {}

    def item(self, place: _Place) -> Item:
        return self.plan.epochs[place[0]].items[place[1]]

    def play(self) -> Program:
        """All epochs, and a farewell."""
        for number, epoch in enumerate(self.plan.epochs):
            mine = [(number, i) for i in range(len(epoch.items)) if self.rank in self.plan.present(number, i)]
            self._todo = list(mine)
            for place in self._shuffled(mine):
                if place in self._todo:
                    yield from self._submit(place)
                    yield True
                while self._outstanding and self.random.random() < 0.25:
                    yield from self._wait(self.random.choice(self._outstanding))
            if epoch.counts is not None and not self.plan.has_left(number):
                for place in list(self._outstanding):
                    if isinstance(self.item(place), Cycle) or self.random.random() < 0.5:
                        yield from self._wait(place)
                yield from self._join(number)
        yield from self._leave()

    def _class(self, place: _Place) -> Any:
        """Items of one class keep their order."""
        item = self.item(place)
        if isinstance(item, Cycle):
            return ("cycles", item.team, item.lane)
        return (item.team, isinstance(item, Group) and item.name is not None, item.name)

    def _shuffled(self, places: list[_Place]) -> list[_Place]:
        reach = self.random.choice((0, 0, 2, 5, 20))
        order = sorted(places, key=lambda place: place[1] + self.random.random() * reach)
        classes: dict[Any, list[int]] = {}
        for at, place in enumerate(order):
            classes.setdefault(self._class(place), []).append(at)
        for positions in classes.values():
            for at, place in zip(positions, sorted(order[at] for at in positions), strict=True):
                order[at] = place
        return order

    # -- one item ------------------------------------------------------------------------------------------------------

    def _submit(self, place: _Place) -> Program:
        self._todo.remove(place)
        item, kind = self.item(place), self._class(place)
        earlier = self._latest.get(kind)
        if earlier in self._outstanding and (isinstance(item, Cycle) or item.name is not None):
            yield from self._wait(earlier)  # the name, or the lane, is not free before
        self._latest[kind] = place
        self._outstanding.append(place)
        number = 100 * place[0] + place[1]
        if isinstance(item, Cycle):
            yield from self._begin(place, item, number, takes_part=True)
            return
        channel = self.channels[item.team]
        assert channel is not None
        self.handles[place] = []
        if isinstance(item, Op):
            if item.name is None:
                channel.unnamed += 1
            self._submit_one(place, channel, item, number, (), item.name or channel.unnamed)
            return
        ops, members = list(item.ops), self.plan.members(item.team)
        if item.shorter is not None and members[item.shorter % len(members)] == self.rank:
            ops.pop()
        if item.name is None:
            channel.unnamed += 1
        first = channel.unnamed if item.name is None else f"{item.name}.0"
        for at, op in enumerate(ops):
            later = (first, at) if isinstance(first, int) else f"{item.name}.{at}"
            group = item.name or "", len(ops)
            self._submit_one(place, channel, op, number + 20 * (at + 1), group, later if at else first)
            yield True

    def _submit_one(
        self, place: _Place, channel: Channel, op: Op, number: int, group: tuple[str, int] | tuple[()], key: Key
    ) -> None:
        plan, rank = self.plan, self.rank
        members = plan.members(op.team)
        mine = naive.as_submitted(plan, op, rank)
        tensor = naive.contribution(plan, mine, rank, number)

        def deliver(value: Any) -> Any:
            if op.brittle is not None and members[op.brittle % len(members)] == rank:
                raise Brittle(f"on rank {rank}")
            return tensor if mine.kind in (Kind.ALLREDUCE, Kind.BROADCAST) else value

        request = Request(
            key,
            naive.signature(plan, mine, group),
            tensor.view(-1),
            deliver,
            extent=naive.extent(plan, mine, rank, number),
            eager=bool(op.eager >> rank & 1) and mine.kind in eager.KINDS and mine.op is not ReduceOp.ADASUM,
            meets=bool(op.meets >> rank & 1)
            and op.name is None
            and mine.kind is Kind.ALLREDUCE
            and mine.op is not ReduceOp.ADASUM
            and may_meet(channel.link, tensor.nbytes),
        )
        self.handles[place].append(self.world.submit(rank, channel, request))

    def _begin(self, place: _Place, cycle: Cycle, number: int, takes_part: bool) -> Program:
        """Begin a cycle and launch its buckets; zeros for a rank that has joined."""
        lane = self.lanes[cycle.team, cycle.lane]
        lane.begin_cycle()
        handles, tensors = self.handles.setdefault(place, []), self.results.setdefault(place, [])
        for index, numel in enumerate(cycle.buckets):
            tensor = bucket(number, index, numel, self.rank)
            if not takes_part:
                tensor.zero_()
            tensors.append(tensor)
            handles.append(lane.launch(f"bucket {index} of {place}", _starting(tensor, index)))
            yield True

    def _wait(self, place: _Place) -> Program:
        """Submit what comes before it, and wait until it is done."""
        while self._todo and min(self._todo) <= place:
            yield from self._submit(min(self._todo))
        yield from _until_done(self.handles[place])
        if place in self._outstanding:
            self._outstanding.remove(place)
            item = self.item(place)
            if isinstance(item, Cycle):
                self.lanes[item.team, item.lane].end_cycle()

    # -- ends ----------------------------------------------------------------------------------------------------------

    def _join(self, epoch: int) -> Program:
        """As :func:`mpiddp.join`."""
        channels = self.engine.channels
        requests = []
        for channel in channels:
            request = Request("mpiddp.join", Signature(int(Kind.JOIN)), torch.empty(0), extent=(channel.unnamed,))
            requests.append(self.world.submit(self.rank, channel, request))
        self.joins.append(requests)
        lanes = [lane for channel in channels for lane in channel.lanes]
        serving: dict[Lane, Program] = {}
        while not all(request.done for request in requests):
            for lane in lanes:
                if lane not in serving and lane.cycle < lane.wanted_cycle:
                    serving[lane] = self._mirror(lane)
                if lane in serving and next(serving[lane], None) is None:
                    del serving[lane]
            yield False

    def _mirror(self, lane: Lane) -> Program:
        """The next cycle of a lane, with zeros."""
        ((team, number),) = [key for key, other in self.lanes.items() if other is lane]
        places = [(e, i) for e, epoch in enumerate(self.plan.epochs) for i in range(len(epoch.items))]
        begun = [(place, self.item(place)) for place in places if self.plan.present(*place)]
        cycles = [(place, item) for place, item in begun if isinstance(item, Cycle)]
        place, cycle = [entry for entry in cycles if (entry[1].team, entry[1].lane) == (team, number)][lane.cycle]
        assert place not in self.handles, f"rank {self.rank} is to mirror {place}, in which it has taken part"
        yield from self._begin(place, cycle, 0, takes_part=False)
        yield from _until_done(self.handles[place])
        lane.end_cycle()

    def _leave(self) -> Program:
        """As :func:`mpiddp.shutdown`: what is in flight still runs. A hasty rank does not wait for the others."""
        channels = self.engine.channels
        for channel in channels:
            channel.leave(channel.steps)
            yield True
        if self.rank not in self.plan.hasty:
            while not all(channel.is_over() for channel in channels):
                yield False
            return
        while any(channel.pending for channel in channels):
            yield False
        for channel in channels:
            channel.give_up()


def _until_done(handles: Iterable[Handle]) -> Program:
    for handle in handles:
        while not handle.done:
            yield False


def _starting(tensor: torch.Tensor, index: int) -> Any:
    def start(link: Link, tag: int) -> Steps:
        if index % 2:
            return ring.allreduce(link, tensor, ReduceOp.SUM, tag, segment_nbytes=16)
        return select.allreduce(link, tensor, ReduceOp.SUM, tag)

    return start
