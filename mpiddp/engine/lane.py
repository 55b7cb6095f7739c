"""Exchanges that all members start in one agreed order without negotiation, such as an optimizer's buckets."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from .. import processes, trace
from ..errors import WorkerProcessError
from ..transport.base import Link, Steps
from ..transport.tags import FIRST_TAG, LANE_TAGS, LANES
from .presence import lane_key
from .request import Handle
from .wire import CYCLE

if TYPE_CHECKING:
    from .channel import Channel

__all__ = ["FIRST_TAG", "Lane", "Watch"]


class Watch(Protocol):
    """Observes a lane."""

    def observe(self, lane: Lane, start: Callable[[Link, int], Steps]) -> Callable[[Link, int], Steps]:
        """What is to be run in place of ``start``."""
        ...

    def waiting(self, lane: Lane) -> AbstractContextManager[None]:
        """Entered while the lane's owner waits for everything that it has launched."""
        ...


class Lane:
    """One such sequence. ``mirror``, set by its owner, takes part in one cycle with zeros, for a rank that has
    joined; or ``refusal`` says why the rank cannot join."""

    def __init__(self, channel: Channel, number: int) -> None:
        self.channel = channel
        self.number = number
        self.launched = 0
        self.cycle = 0
        self.is_in_cycle = False
        self.wanted_cycle = 0
        self.mirror: Callable[[], None] | None = None
        self.refusal: Callable[[], str | None] | None = None
        self.watch: Watch | None = None
        self._generation = processes.generation()
        self._where = channel.ranks, number
        self._counted = channel.presence.lane(lane_key(channel.ranks, number))
        self._first_tag = FIRST_TAG + number % LANES * LANE_TAGS

    @property
    def link(self) -> Link:
        """The members."""
        return self.channel.link

    def launch(self, name: str, start: Callable[[Link, int], Steps], result: Any = None) -> Handle:
        """Run ``start(link, tag)``; the handle's result is ``result``."""
        self._check_process()
        self.channel.wake()  # raises where the engine has been stopped
        handle = Handle(name, self._where)
        self.launched += 1
        tag = self.tag(self.launched)
        self.channel.presence.words[self._counted] = self.launched
        if trace.active():
            trace.instant("submitted", name=name, of=(handle,))
        lost = self.channel.departures.lost_after(self.number, self.launched)
        if lost is not None:
            handle.fail(lost)
            return handle
        if self.watch is not None:
            start = self.watch.observe(self, start)
        self.channel.enqueue(handle, self.number, self.launched, lambda link: start(link, tag), result)
        return handle

    def _check_process(self) -> None:
        if processes.generation() != self._generation:
            raise WorkerProcessError(
                f"a DistributedOptimizer was to communicate in process {os.getpid()}, a child of rank "
                f"{self.channel.ranks[self.link.rank]}: MPI belongs to the rank's own process alone. Call step() there"
            )

    def waiting(self) -> AbstractContextManager[None]:
        """To be entered while the owner waits for all that it has launched in this cycle."""
        return nullcontext() if self.watch is None else self.watch.waiting(self)

    def tag(self, number: int) -> int:
        """The tag of the ``number``th launch; later ones have it again."""
        return self._first_tag + number % LANE_TAGS

    def begin_cycle(self) -> None:
        """The first launches of an optimizer's step are about to come; ranks that have joined must take part."""
        self._check_process()
        self.cycle += 1
        self.channel.presence.step(self.cycle)
        self.is_in_cycle = True
        if self.channel.somebody_joined:
            self.call_joined()

    def end_cycle(self) -> None:
        """All that was launched since :meth:`begin_cycle` is done."""
        self.is_in_cycle = False

    def call_joined(self) -> None:
        """Tell the ranks that have joined which cycle is going on."""
        self.channel.tell_coordinator(CYCLE, self.number, self.cycle)

    def serve_joined(self) -> None:
        """On a rank that has joined: take part in the cycles that others have begun."""
        while self.cycle < self.wanted_cycle and self.mirror is not None:
            self.mirror()

    def __repr__(self) -> str:
        return f"Lane({self.number}, {self.launched} launched, cycle {self.cycle})"
