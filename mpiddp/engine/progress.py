"""The engine: resumes the exchanges that are in flight. Progress is a function; whoever has time calls it.

State, all of it guarded by ``Engine._lock``, which is only ever tried and never waited for by a thread that may hold
it: the channels, their negotiation and their running exchanges. ``submit`` and ``launch`` add to inboxes
(``deque.append`` is atomic), so that they never wait for a push under way.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ..errors import MismatchError, MpiddpError
from ..trace import span
from ..transport.base import Link, Steps
from ..transport.control import Port
from .execute import exchange
from .liveness import Liveness
from .negotiate import Coordinator, Member
from .neutral import neutral
from .request import Handle, Request

__all__ = ["Channel", "Engine", "Lane"]

#: Tags of negotiated exchanges: 0 up to here. Lanes have the tags above, a block each.
_NEGOTIATED_TAGS = 8192
_LANE_TAGS = 64
_LANES = 256

#: Exchanges of one channel that are resumed in turn; those behind them wait. Bounds the memory for scratch buffers.
_RUNNING = 16

#: The ladder of waiting: so many pushes at once, then giving the core away between pushes, then short sleeps.
_SPINS = 20
_YIELD_S = 0.02
_SLEEP_S = 0.0002


class Lane:
    """Exchanges that all members start in one agreed order without negotiation, such as an optimizer's buckets."""

    def __init__(self, engine: Engine, channel: Channel, number: int) -> None:
        self._engine, self._channel = engine, channel
        self._first_tag = _NEGOTIATED_TAGS + number % _LANES * _LANE_TAGS
        self._count = 0

    @property
    def link(self) -> Link:
        """The members."""
        return self._channel.link

    def launch(self, name: str, start: Callable[[Link, int], Steps], result: Any = None) -> Handle:
        """Run ``start(link, tag)`` as soon as there is room; the handle's result is ``result``."""
        handle = Handle(name)
        tag = self._first_tag + self._count % _LANE_TAGS
        self._count += 1
        self._engine.enqueue(self._channel, handle, lambda link: start(link, tag), result)
        return handle


class Channel:
    """One process set: its members, its negotiation, and its exchanges."""

    def __init__(self, link: Link, port: Port, fusion_nbytes: int, segment_nbytes: int) -> None:
        self.link = link
        self.port = port
        self.submitted: deque[Request] = deque()
        self.launched: deque[tuple[Handle, Callable[[Link], Steps], Any]] = deque()
        self.member = Member()
        self.coordinator = Coordinator(link.size, fusion_nbytes) if link.rank == 0 else None
        self._segment_nbytes = segment_nbytes
        self._starting: deque[tuple[list[Handle], Callable[[], Steps]]] = deque()
        self._running: list[tuple[list[Handle], Steps]] = []
        self._tag = 0

    @property
    def pending(self) -> bool:
        """Whether this rank waits for anything here."""
        return bool(
            self._running
            or self.submitted
            or self.launched
            or self.member.waiting
            or self._starting
            or self.port.leaving
        )

    def advance(self) -> bool:
        """One round: negotiate, start, resume. True if anything moved."""
        if self.port.leaving:
            self.port.flush()
        moved = self._negotiate()
        while self.launched:
            handle, start, result = self.launched.popleft()
            self._running.append(([handle], _finishing(start(self.link), handle, result)))
            moved = True
        while self._starting and len(self._running) < _RUNNING:
            handles, build = self._starting.popleft()
            self._running.append((handles, build()))
            moved = True
        if self._running:
            self._running = [entry for entry in self._running if not self._resume(*entry)]
        return moved

    def _negotiate(self) -> bool:
        while self.submitted:
            self.member.submit(self.submitted.popleft())
        coordinator, port = self.coordinator, self.port
        message = self.member.message()
        moved = message is not None
        if message is not None:
            if coordinator is not None:
                coordinator.receive(0, message)
            else:
                port.send(0, message)
        if not self.member.waiting:
            return moved
        while (arrived := port.poll() if self.link.size > 1 else None) is not None:
            moved = True
            if coordinator is not None:
                coordinator.receive(*arrived)
            else:
                self._schedule(arrived[1])
        if coordinator is not None:
            for peer, run_list in coordinator.messages():
                if peer == 0:
                    self._schedule(run_list)
                else:
                    port.send(peer, run_list)
        return moved

    def _schedule(self, run_list: bytes) -> None:
        for run in self.member.runs(run_list):
            handles = [request.handle for request in run.requests]
            if run.error is not None:
                for handle in handles:
                    handle.fail(MismatchError(run.error))
                continue
            tag = self._tag
            self._tag = (tag + 1) % _NEGOTIATED_TAGS
            self._starting.append(
                (handles, lambda run=run, tag=tag: exchange(self.link, run, tag, self._segment_nbytes))  # type: ignore[misc]
            )

    def _resume(self, handles: list[Handle], steps: Steps) -> bool:
        """Whether the exchange has ended. What it raises belongs to those who wait for it."""
        try:
            next(steps)
        except StopIteration:
            return True
        except Exception as error:
            for handle in handles:
                handle.fail(error)
            return True
        return False

    def fail_all(self, error: MpiddpError) -> None:
        """Nothing here will be done any more."""
        handles = [request.handle for request in (*self.submitted, *self.member.waiting.values())]
        handles += [entry[0] for entry in self.launched]
        for group, _ in (*self._starting, *self._running):
            handles += group
        for handle in handles:
            if not handle.done:
                handle.fail(error)
        self.submitted.clear()
        self.launched.clear()
        self.member.waiting.clear()
        self._starting.clear()
        self._running.clear()


def _finishing(steps: Steps, handle: Handle, result: Any) -> Steps:
    with span("exchange", name=handle.name):
        yield from steps
    handle.finish(result)


class Engine:
    """All channels of this rank, and the one guard around every push."""

    def __init__(self, thread_level: str, progress_interval_s: float, after_push: Callable[[], None]) -> None:
        self.channels: list[Channel] = []
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._thread_level = thread_level
        self._main_thread = threading.get_ident()
        self._after_push = after_push
        self._lanes = 0
        self._stopped: MpiddpError | None = None
        self.last_push_s = time.monotonic()
        self._liveness = Liveness(self, progress_interval_s) if thread_level == "multiple" else None

    def lane(self, channel: Channel) -> Lane:
        """A new lane; all members make theirs in one order."""
        self._lanes += 1
        return Lane(self, channel, self._lanes)

    def submit(self, channel: Channel, request: Request) -> Handle:
        """Negotiate and run ``request`` when every member has submitted it."""
        self._check_running()
        channel.submitted.append(request)
        self._wake()
        return request.handle

    def enqueue(self, channel: Channel, handle: Handle, start: Callable[[Link], Steps], result: Any) -> None:
        """Run an exchange that needs no negotiation."""
        self._check_running()
        channel.launched.append((handle, start, result))
        self._wake()

    def _check_running(self) -> None:
        if self._stopped is not None:
            raise self._stopped

    def _wake(self) -> None:
        if self._liveness is not None:
            self._liveness.wake()

    def is_pushing(self) -> bool:
        """Whether the calling thread is inside a push."""
        return self._owner == threading.get_ident()

    def pending(self) -> bool:
        """Whether anything is in flight."""
        return any(channel.pending for channel in self.channels)

    def may_push(self) -> bool:
        """Whether MPI lets the calling thread in."""
        return self._thread_level in ("serialized", "multiple") or threading.get_ident() == self._main_thread

    def push(self) -> bool:
        """Resume what is in flight, once; True if something moved.

        Does nothing while another thread pushes, or when called from inside a push (a signal handler, ``__del__``, a
        hook).
        """
        if not self.may_push() or not self._lock.acquire(blocking=False):
            return False
        self._owner = threading.get_ident()
        try:
            with neutral():
                moved = False
                for channel in self.channels:
                    moved |= channel.advance()
        finally:
            self._owner = None
            self.last_push_s = time.monotonic()
            self._lock.release()
        self._after_push()
        return moved

    def wait(self, handle: Handle) -> Any:
        """Push until ``handle`` is done; return its result or raise its error."""
        if not handle.done:
            self.wait_until(lambda: handle.done, handle.name)
        if handle.error is not None:
            raise handle.error
        return handle.result

    def wait_until(self, done: Callable[[], bool], what: str, timeout_s: float | None = None) -> bool:
        """Push until ``done()``; False if that took longer than ``timeout_s``."""
        if self.is_pushing():
            raise MpiddpError(f"cannot wait for {what} from inside a push (a signal handler, __del__ or a hook)")
        if not self.may_push():
            raise MpiddpError(
                f"cannot wait for {what} in thread {threading.current_thread().name!r}: MPI was started at thread "
                f"level {self._thread_level!r}, which lets only the main thread in; wait there, or start MPI at "
                "level "
                "'multiple'"
            )
        spins, began = 0, time.monotonic()
        while not done():
            if self.push():
                spins = 0
                continue
            spins += 1
            if spins < _SPINS:
                continue
            waited = time.monotonic() - began
            if timeout_s is not None and waited > timeout_s:
                return False
            if waited < _YIELD_S:
                os.sched_yield()
            else:
                time.sleep(_SLEEP_S)
        return True

    def stop(self, error: MpiddpError) -> None:
        """Stop the liveness thread; what is still in flight, and what comes later, fails with ``error``."""
        self._stopped = error
        if self._liveness is not None:
            self._liveness.stop()
        for channel in self.channels:
            channel.fail_all(error)

    def __repr__(self) -> str:
        state = "pushing" if self._owner else "in flight" if self.pending() else "idle"
        return f"Engine({len(self.channels)} channels, {state})"
