"""One process set: its members, its negotiation, and its exchanges.

State: guarded by the engine's lock, apart from ``submitted`` and ``launched``, to which anybody may append at any time
(``deque.append`` is atomic).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

from .. import trace
from ..errors import ArgumentError, MpiddpError
from ..transport.base import Link, Steps
from ..transport.control import Port
from .coordinator import Coordinator
from .departures import Departures
from .eager import receive
from .execute import exchange, phantom
from .lane import Lane
from .launches import Launches
from .meet import cancel, meet
from .member import Member, Run
from .mismatch import ERRORS
from .notices import heed
from .presence import Presence
from .request import Handle, Kind, Request
from .running import Running
from .starting import Starting
from .wire import GONE, LEFT, pack, unpack

if TYPE_CHECKING:
    from .prompt import Recipe

__all__ = ["Channel"]

#: A coordinator with nothing pending of its own looks once in so many pushes whether others want something of it.
_LISTENING = 64


class Channel:
    """``ranks`` are the members' world ranks. ``wake`` is called when something has been submitted."""

    def __init__(self, link: Link, port: Port, ranks: Sequence[int], fusion_nbytes: int, segment_nbytes: int) -> None:
        self.link, self.port, self.ranks = link, port, tuple(ranks)
        self.where = self.ranks, -1  # of what is negotiated here
        # Under which names something is in flight on this rank. Weak: who waits keeps the tensors, and nobody else.
        self.names: dict[str, ref[Request]] = {}
        self.unnamed = 0
        self.recipes: dict[Any, Recipe] = {}  # of all-reduces that have met, by what tells them apart
        self.submitted: deque[Request] = deque()
        self.launches = Launches()
        self.member = Member()
        self.coordinator = Coordinator(ranks, fusion_nbytes) if link.rank == 0 else None
        self.lanes: list[Lane] = []
        self.somebody_joined = False
        self.departures = Departures(self.ranks)
        self.completed = 0
        self.wake: Callable[[], None] = lambda: None
        self.news: dict[str, Callable[..., None]] = {}  # who hears what the parts above tell each other, by topic
        self.attention = 0  # how many want to hear what comes, although nothing else is pending
        self.presence = Presence.alone()
        self.running: list[Running] = []
        self._segment_nbytes = segment_nbytes
        self._starting = Starting()
        self._abandoned: list[Running] = []  # MPI may still write into their buffers
        self._unheard = 0  # pushes since the last look

    @property
    def pending(self) -> bool:
        """Whether this rank waits for anything here."""
        return bool(
            self.member.waiting
            or self.submitted
            or self.running
            or self.launches
            or self.member.outbox
            or self._starting
            or self.port.leaving
        )

    @property
    def steps(self) -> int:
        """How far this rank has come: its optimizer's steps, or else the operations that it has completed."""
        return max((lane.cycle for lane in self.lanes), default=0) or self.completed

    def lane(self) -> Lane:
        """A new lane; all members make theirs in one order."""
        self.lanes.append(Lane(self, len(self.lanes)))
        return self.lanes[-1]

    def enqueue(self, handle: Handle, lane: int, number: int, start: Callable[[Link], Steps], result: Any) -> None:
        """Run an exchange that needs no negotiation."""
        self.launches.add(handle, lane, number, start, result)
        self.wake()

    def tell_coordinator(self, *notice: Any) -> None:
        """Send a notice with the next push."""
        self.member.notice(*notice)
        self.wake()

    # -- one round -----------------------------------------------------------------------------------------------------

    def advance(self) -> bool:
        """Negotiate, start, resume. True if anything moved."""
        if not (self.pending or self.attention or self._is_listening()):
            return False
        if self.port.leaving:
            self.port.flush()
        moved = self._negotiate()
        if self.launches:
            moved |= self.launches.start(self.link, self.lanes, self.running, self.departures)
        if self._starting:
            moved |= self._starting.start(self.running)
        if self.running:
            states = [running.resume() for running in self.running]
            self.running = [running for running, state in zip(self.running, states, strict=True) if not state]
            moved |= any(state is not False for state in states)
        return moved

    def _is_listening(self) -> bool:
        """Others may wait for a word of the coordinator, such as that somebody has left, when it waits for nothing."""
        self._unheard += 1
        if self._unheard < _LISTENING or self.coordinator is None or self.link.size == 1:
            return False
        self._unheard = 0
        return True

    def listen(self) -> None:
        """Look with the next push."""
        self._unheard = _LISTENING

    def _announce_all(self) -> None:
        """Those of this rank that are to meet the others must be known before it joins or leaves."""
        for running in self.running:
            if running.gathering is not None and not self.departures.coordinator_gone:
                running.gathering.announce()

    def may_meet(self) -> bool:
        """Whether nobody is absent, and no timeline or profiler is to show what happens."""
        return not (self.somebody_joined or self.departures.left or trace.is_watched())

    def _take_submitted(self) -> bool:
        """Announce with the next message what has been submitted, or meet the others; True."""
        while self.submitted:
            request = self.submitted.popleft()
            if self.departures.coordinator_gone:
                request.fail(self.departures.without_coordinator(request))
            elif request.meets and meet(self, request):
                continue
            else:
                if self.running and request.signature.kind == Kind.JOIN:
                    self._announce_all()
                self.member.submit(request)
        return True

    def speak(self) -> None:
        """Tell the coordinator what it has not heard. Called under the engine's lock."""
        message = self.member.message()
        if not message or self.departures.coordinator_gone:
            return
        if self.coordinator is not None:
            self.coordinator.receive(0, message)
        else:
            self.port.send(0, pack(message))

    def _negotiate(self) -> bool:
        member, coordinator, port = self.member, self.coordinator, self.port
        moved = self._take_submitted() if self.submitted else False
        if member.outbox:
            self.speak()
        if self.link.size > 1:
            while (arrived := port.poll()) is not None:
                moved = True
                if coordinator is not None:
                    coordinator.receive(arrived[0], unpack(arrived[1]))
                else:
                    self._heed(unpack(arrived[1]))
        if coordinator is not None:
            for peer, message in coordinator.messages():
                moved = True
                if peer == 0:
                    self._heed(message)
                else:
                    port.send(peer, pack(message))
        return moved

    def _heed(self, message: list[tuple[Any, ...]]) -> None:
        runs, notices = self.member.read(message)
        for run in runs:
            self._schedule(run)
        for notice in notices:
            heed(self, notice)

    def _answered(self, run: Run) -> bool:
        """Whether the run list holds the result, or an error, and nothing is to be exchanged."""
        requests = run.requests
        if run.error is not None:
            name, text = run.error
            for request in requests:
                request.fail(ERRORS[name](text))
        elif run.payload is not None:
            for request in requests:
                try:
                    receive(request, run.payload, run.extents)
                except Exception as error:
                    request.fail(error)
        elif requests and requests[0].signature.kind == Kind.JOIN:
            last, unnamed = run.extents[0]
            self.unnamed = max(self.unnamed, unnamed)  # those who joined early have not counted the others'
            requests[0].finish(last)
        else:
            return False
        return True

    def _schedule(self, run: Run) -> None:
        requests = run.requests
        if any(request.meets and not cancel(self, request) for request in requests):
            return  # whoever has announced that they would meet is alone in its run
        self.completed += len(requests)
        if self._answered(run):
            if trace.active() and requests:
                trace.instant("done", name=requests[0].name, of=requests)
            return
        if run.phantoms:
            requests = run.requests = [phantom(self.link, signature) for signature in run.phantoms]
        if trace.active():
            trace.instant("ready", name=requests[0].name, of=requests)
        self._starting.add(
            requests, lambda tag: partial(exchange, self.link, self.ranks, run, tag, self._segment_nbytes)
        )

    # -- ranks that join or leave --------------------------------------------------------------------------------------

    def abandon(self, exchanges: Sequence[Running], error: MpiddpError) -> None:
        """Those who wait for these exchanges, if they still go on, get ``error``."""
        for running in exchanges:
            if running in self.running:
                self.running.remove(running)
                self._abandoned.append(running)
                for handle in running.handles:
                    handle.fail(error)

    def leave(self, steps: int) -> None:
        """Tell the others that this rank takes part no more, after so many steps; hear when they have left, too.

        What was submitted before still runs. To be called where nobody pushes.
        """
        self._take_submitted()
        self._announce_all()
        self.attention += 1
        self.tell_coordinator(LEFT, self.ranks[self.link.rank], steps, [lane.launched for lane in self.lanes])

    def is_over(self) -> bool:
        """Whether nobody is left to wait for, and what was in flight is done."""
        return (self.departures.everybody or self.departures.coordinator_gone) and not self.pending

    def give_up(self) -> None:
        """The coordinator ends although some members have not left: they must not wait for it."""
        if self.coordinator is not None and not self.departures.everybody:
            for peer in range(1, self.link.size):
                self.port.send(peer, pack([(GONE,)]))

    def fail_all(self, error: MpiddpError) -> None:
        """Nothing here will be done any more."""
        handles: list[Handle] = [*self.submitted, *self.member.waiting.values()]
        handles += self.launches.clear()
        handles += self._starting.clear()
        for running in self.running:
            handles += running.handles
        for handle in handles:
            if not handle.done:
                handle.fail(error)
        self._abandoned += self.running
        self.submitted.clear()
        self.member.waiting.clear()
        self.running.clear()

    def retire(self, why: str) -> None:
        """Nobody pushes this any more: what is here fails, and what comes later raises, with an ArgumentError."""

        def refuse() -> None:
            raise ArgumentError(why)

        self.wake = refuse
        self.fail_all(ArgumentError(why))

    def close(self, is_clean: bool) -> None:
        """Give back what the link's GPUs hold. ``is_clean``: nothing is under way, here or elsewhere."""
        within = self.link if self.link.levels is None else self.link.levels.local
        within.ways.close(is_clean)

    def __repr__(self) -> str:
        state = f"{len(self.running)} running, {len(self.member.waiting)} waiting" if self.pending else "idle"
        return f"Channel(member {self.link.rank} of {self.link.size}, {state})"
