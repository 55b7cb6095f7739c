"""Several engines in one thread, over a simulated network. When each is pushed, when its rank's program goes on, and
when a message arrives is drawn from a seed; so is how fast each rank is, how slow the messages of each pair are, and
whether sends are buffered.

Only what may make a difference is an event: a rank sleeps while nothing has happened that it could have noticed.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any

import torch

from mpiddp.collectives.base import ReduceOp
from mpiddp.dtypes import name_of
from mpiddp.engine import Channel, Engine, Handle, Kind, Request, Signature, follow_at_once, meet_at_once
from mpiddp.engine.prompt import Recipe
from mpiddp.transport.node import Node
from tests.simulated_node import WatchedWords, nodes
from tests.simulation import Deadlock, Network, SimulatedLink

__all__ = ["Program", "SimulatedPort", "World"]

#: What a rank does: yields True when it has done something, False while it waits.
Program = Generator[bool, None, None]

#: Looks of everybody in which nothing moves: a deadlock. What only posts a transfer or sends a notice does not count.
_LOOKS = 4

#: Whatever a rank does after some time it does after this.
_LONG = 1000.0


class SimulatedPort:
    """Control messages of one pair arrive in order, some time after they were sent."""

    def __init__(self, world: World, rank: int, ports: list[SimulatedPort], slowness: Sequence[float]) -> None:
        self.world, self.rank, self.ports, self.slowness = world, rank, ports, slowness
        self.owner = 0
        self.arrived: deque[tuple[int, bytes]] = deque()
        self.on_the_way: list[float] = [0.0] * len(slowness)  # when the last one from each peer arrives
        self.sent = 0
        self.leaving = False

    def send(self, peer: int, message: bytes) -> None:
        assert message and peer != self.rank
        self.sent += 1
        target = self.ports[peer]
        at_s = self.world.soon(target.slowness[self.rank], not_before=target.on_the_way[self.rank])
        target.on_the_way[self.rank] = at_s
        self.world.schedule(at_s, target, (self.rank, message))

    def poll(self) -> tuple[int, bytes] | None:
        return self.arrived.popleft() if self.arrived else None

    def flush(self) -> None:
        pass


class _RecipeFor(Recipe):
    """Of a request that is there already. Nobody moves while one looks."""

    looks = 1

    def __init__(self, node: Node, request: Request) -> None:
        super().__init__(node, request.signature, request.flat)
        self._request = request

    def request(self, *_: object) -> Request:
        return self._request


class World:
    """``size`` engines, each with a channel for everyone and one for each of the ``teams`` that it belongs to."""

    def __init__(
        self,
        size: int,
        seed: int = 0,
        fusion_nbytes: int = 1 << 20,
        teams: Sequence[Sequence[int]] = (),
        segment_nbytes: int = 64,
        is_buffering: bool = False,
        shares_memory: bool = False,
        has_areas: bool | None = None,
    ) -> None:
        self.size = size
        self.nodes: list[Node] = []
        self.network = Network(size, seed, is_buffering)
        self.network.on_match = lambda key: self.schedule(self.soon(self._transit), key)
        self.clock = 0.0
        self._events: list[tuple[float, int, Any, Any]] = []
        self._count = 0
        draw = self.network.random
        self._shares_memory = shares_memory
        self._has_areas = draw.random() < 0.5 if has_areas is None else has_areas
        self._turns = [draw.choice((1.0, 1.0, 1.0, 5.0, 40.0)) for _ in range(size)]
        self._transit, self._pushing = draw.choice((0.1, 2.0, 20.0)), draw.choice((0.3, 0.6, 0.9))
        # Thread level "single": no liveness thread, all is deterministic.
        self.engines = [Engine("single", 1.0, lambda: None) for _ in range(size)]
        self.teams = [tuple(range(size)), *(tuple(team) for team in teams)]
        self.by_team = [self._open(team, fusion_nbytes, segment_nbytes) for team in self.teams]
        self.channels = [self.by_team[0][rank] for rank in range(size)]
        self.ports = [channel.port for channel in self.channels]
        self.programs: dict[int, Program] = {}
        self._in_vain = [[False, False] for _ in range(size)]  # whether it has gone on, and pushed, in vain
        self._sleeps = [True] * size

    def _open(self, team: tuple[int, ...], fusion_nbytes: int, segment_nbytes: int) -> dict[int, Channel]:
        draw, ports, channels = self.network.random, [], {}
        links = self.network.links(team)
        if self._shares_memory and len(team) > 1:
            self._share(links, team)
        for link in links:
            ports.append(SimulatedPort(self, link.rank, ports, [draw.choice((0.5, 2.0, 10.0, 80.0)) for _ in team]))
            rank = ports[-1].owner = team[link.rank]
            channels[rank] = Channel(link, ports[-1], team, fusion_nbytes, segment_nbytes)
            self.engines[rank].add(channels[rank])
        return channels

    def _share(self, links: Sequence[SimulatedLink], team: tuple[int, ...]) -> None:
        """The team is on one node: whatever a member writes, the others may notice."""
        for link, node in zip(links, nodes(len(team), self._has_areas), strict=True):
            others = [rank for rank in team if rank != team[link.rank]]
            node.words = WatchedWords(node.words, partial(self._wake_all, others))  # type: ignore[assignment]
            link.node = node
            self.nodes.append(node)

    def close(self) -> None:
        """Give back the memory that the nodes share."""
        for node in self.nodes:
            node.memory.close()

    # -- what programs do ----------------------------------------------------------------------------------------------

    def submit(self, rank: int, channel: Channel, request: Request) -> Request:
        engine = self.engines[rank]
        engine.last_push_s = math.inf  # submitting pushes by the clock; here the seed alone decides
        way = self.network.random.random() if request.meets else 1.0
        if way < 0.3:
            return meet_at_once(engine, channel, request)
        if way < 0.6 and channel.link.node is not None:
            return self._follow(engine, channel, channel.link.node, request)
        return engine.submit(channel, request)

    def _follow(self, engine: Engine, channel: Channel, node: Node, request: Request) -> Request:
        """By a recipe, as a later call of the same kind goes."""
        key, numbered = request.key, channel.unnamed
        assert isinstance(key, int)
        channel.unnamed = key - 1
        recipe = _RecipeFor(node, request)
        awaited = follow_at_once(engine, channel, recipe, request.flat, request.answer)
        channel.unnamed = numbered
        if awaited is None:
            request.complete(request.flat)
            return request
        return awaited

    def allreduce(self, rank: int, key: str | int, values: list[float], op: ReduceOp = ReduceOp.SUM) -> Handle:
        flat = torch.tensor(values)
        signature = Signature(int(Kind.ALLREDUCE), name_of(flat.dtype), tuple(flat.shape), int(op))
        return self.submit(rank, self.channels[rank], Request(key, signature, flat, answer=flat))

    def run(self, handles: Sequence[Handle]) -> None:
        """Push until the handles are done."""

        def wait() -> Program:
            while not all(handle.done for handle in handles):
                yield False

        self.play({rank: wait() for rank in range(self.size)})

    # -- time ----------------------------------------------------------------------------------------------------------

    def soon(self, mean: float, not_before: float = 0.0) -> float:
        """A time to come, drawn from the seed."""
        return max(self.clock - mean * math.log(1.0 - self.network.random.random()), not_before)

    def schedule(self, at: float, what: Any, more: Any = None) -> None:
        """A rank's turn, a message for a port, or a transfer, at a time."""
        self._count += 1
        heapq.heappush(self._events, (at, self._count, what, more))

    def play(self, programs: dict[int, Program]) -> None:
        """Run what each rank does to its end. Raises Deadlock if nobody can go on."""
        self.programs = dict(programs)
        for rank in self.programs:
            self._wake(rank)
        while self.programs:
            if self._events:
                self._next()
                continue
            self.clock += _LONG  # who only waits for time to pass goes on
            if not any(self._everybody() for _ in range(_LOOKS)):
                raise Deadlock("; ".join(self._waits_for(rank) for rank in self.programs))

    def _next(self) -> None:
        self.clock, _, what, more = heapq.heappop(self._events)
        if isinstance(what, int):
            self._turn(what)
        elif isinstance(what, SimulatedPort):
            what.arrived.append(more)
            self._wake(what.owner)
        else:
            for rank in self.network.complete(what):
                self._wake(rank)

    def _wake_all(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            self._wake(rank)

    def _wake(self, rank: int) -> None:
        self._in_vain[rank] = [False, False]
        if self._sleeps[rank] and rank in self.programs:
            self._sleeps[rank] = False
            self.schedule(self.soon(self._turns[rank]), rank)

    def _turn(self, rank: int) -> None:
        if rank not in self.programs:
            return
        in_vain = self._in_vain[rank]
        pushes = not in_vain[True] and (in_vain[False] or self.network.random.random() < self._pushing)
        if self.engines[rank].push() if pushes else self._step(rank):
            in_vain[:] = False, False
        else:
            in_vain[pushes] = True
        if all(in_vain):
            self._sleeps[rank] = True
        else:
            self.schedule(self.soon(self._turns[rank]), rank)

    def _step(self, rank: int) -> bool:
        """Resume the rank's program. One that has ended pushes no more."""
        try:
            return next(self.programs[rank])
        except StopIteration:
            del self.programs[rank]
            return True

    def _everybody(self) -> bool:
        """A look of each rank, as its liveness thread takes now and then; True if anything moved."""
        moved = False
        for rank in list(self.programs):
            if self.engines[rank].listen() | self._step(rank):
                self._wake(rank)
                moved = True
        return moved or bool(self._events)

    def _waits_for(self, rank: int) -> str:
        said = []
        for channel in self.engines[rank].channels:
            waiting = [request.name for request in channel.member.waiting.values()]
            running = [handle.name for exchange in channel.running for handle in exchange.handles]
            if waiting or running:
                said.append(f"of {channel.ranks}: {waiting} not run, {running} running")
        return f"rank {rank} waits for ever ({', '.join(said) or 'nothing submitted'})"
