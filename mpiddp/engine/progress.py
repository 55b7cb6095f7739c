"""The engine: resumes the exchanges that are in flight. Progress is a function; whoever has time calls it.

State: the channels, guarded by ``_lock``, which is only ever tried and never waited for by a thread that may hold it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

from .. import trace
from ..errors import MpiddpError
from ..transport.doorbell import Doorbell
from ..uncompiled import uncompiled
from .channel import Channel
from .ladder import ladder_for
from .liveness import Liveness
from .neutral import apart_from_modes, is_neutral
from .presence import COMPUTING, WAITING, Presence
from .request import Handle, Request
from .stall import StallCheck

__all__ = ["Engine"]

#: Between attempts to be the only one who pushes.
_ATTEMPT_S = 0.0002

#: Who submits pushes, too, when nobody has for so long; what is submitted in between is announced, and fused, together.
_SUBMITTING_S = 0.001

_T = TypeVar("_T")


class Engine:
    """All channels of this rank, and the one guard around every push."""

    def __init__(self, thread_level: str, progress_interval_s: float, after_push: Callable[[], None]) -> None:
        self.channels: list[Channel] = []
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._may_any_thread = thread_level in ("serialized", "multiple")
        self._thread_level = thread_level
        self._main_thread = threading.get_ident()
        self.after_push = after_push
        self._is_served = False
        self._is_between_hosts = False
        self._bell: Doorbell | None = None
        self._stopped: MpiddpError | None = None
        self.last_push_s = time.monotonic()
        self.presence = Presence.alone()
        self._stalls: StallCheck | None = None
        self._look_at_s = math.inf
        self._liveness = Liveness(self, progress_interval_s) if thread_level == "multiple" else None

    def observe(self, presence: Presence, warn_s: float, abort_s: float) -> None:
        """Before the first channel is added: publish in ``presence``, and report what waits for long."""
        self.presence = presence
        self._stalls = StallCheck(self, presence, warn_s, abort_s)
        self._look_at_s = self._stalls.next_look_s

    def patient(self) -> AbstractContextManager[None]:
        """As in :meth:`StallCheck.patient`."""
        return nullcontext() if self._stalls is None else self._stalls.patient()

    def span_hosts(self, bell: Doorbell | None) -> None:
        """Some ranks are on other hosts: wait for them without taking a core from whoever computes. With a ``bell`` all
        others are."""
        self._is_between_hosts, self._bell = True, bell

    def add(self, channel: Channel) -> None:
        """Push ``channel`` from now on."""
        channel.wake = self.wake
        channel.presence = self.presence
        if self._stalls is not None:
            self._stalls.watch(channel)
        self.channels = [*self.channels, channel]

    def remove(self, channel: Channel, why: str) -> None:
        """Push ``channel`` no more; whoever uses it still, such as an optimizer, gets an error that says ``why``."""
        self.channels = [other for other in self.channels if other is not channel]
        if self._stopped is None:
            self.alone(lambda: channel.retire(why))

    @uncompiled
    def submit(self, channel: Channel, request: Request) -> Request:
        """Negotiate and run ``request`` when every member has submitted it."""
        if self._stopped is not None:
            raise self._stopped
        now = time.monotonic()
        request.where = channel.where
        if trace.active():
            trace.instant("submitted", name=request.name, of=(request,))
        self.presence.submitted(request.key, request.signature.kind, now)
        channel.submitted.append(request)
        if self._liveness is not None:
            self._liveness.wake()
        # A caller that submits again and again pushes now and then, so that the liveness thread need not.
        if now - self.last_push_s > _SUBMITTING_S:
            self.push()
        return request

    def begins_alone(self) -> bool:
        """Begin a push of the caller's own, if it may and nothing is in flight: to be ended by :meth:`ends`."""
        thread = threading.get_ident()
        if (
            self._stopped is not None
            or not (self._may_any_thread or thread == self._main_thread)
            or not is_neutral()
            or self.pending()
            or not self._lock.acquire(False)
        ):
            return False
        self._owner = thread
        return True

    def ends(self) -> float:
        """The end of a push, and when that was."""
        self._owner = None
        self.last_push_s = now = time.monotonic()
        self.presence.push_ends(now)
        self._lock.release()
        return now

    def goes_on(self, request: Request, now: float) -> None:
        """What has been begun in a push of the caller's own may have to be waited for."""
        self.presence.submitted(request.key, request.signature.kind, now)
        if not request.done and self._liveness is not None:
            self._liveness.wake()

    def wake(self) -> None:
        """Something is in flight now."""
        if self._stopped is not None:
            raise self._stopped
        if self._liveness is not None:
            self._liveness.wake()

    def is_pushing(self) -> bool:
        """Whether the calling thread is inside a push."""
        return self._owner is not None and self._owner == threading.get_ident()

    def pending(self) -> bool:
        """Whether anything is in flight."""
        for channel in self.channels:  # noqa: SIM110  any() takes a microsecond
            if channel.attention or channel.pending:
                return True
        return False

    def may_push(self) -> bool:
        """Whether MPI lets the calling thread in."""
        return self._may_any_thread or threading.get_ident() == self._main_thread

    @uncompiled
    def push(self) -> bool:
        """Resume what is in flight, once; True if something moved.

        Does nothing while another thread pushes, or when called from inside a push (a signal handler, ``__del__``, a
        hook).
        """
        if not (self._may_any_thread or threading.get_ident() == self._main_thread):
            return False
        if not self._lock.acquire(blocking=False):
            return False
        self._owner = threading.get_ident()
        self.presence.push_begins()
        try:
            moved = self._advance() if is_neutral() else apart_from_modes(self._advance)
        finally:
            now = self.ends()
        self.after_push()
        if now >= self._look_at_s and self._stalls is not None:
            self._look_at_s = math.inf  # other threads push meanwhile
            self._stalls.check(now)
            self._look_at_s = self._stalls.next_look_s
        return moved

    def listen(self) -> bool:
        """A push that hears what others want of the coordinators here, although nothing of this rank's is in flight."""
        for channel in self.channels:
            channel.listen()
        return self.push()

    def inspect(self, look: Callable[[], _T]) -> _T | None:
        """``look()`` while nobody pushes; None where somebody does."""
        if not self._lock.acquire(blocking=False):
            return None
        self._owner = threading.get_ident()
        try:
            return look()
        finally:
            self._owner = None
            self._lock.release()

    @uncompiled
    def alone(self, change: Callable[[], None]) -> None:
        """``change()`` while nobody pushes; waits for that, and so raises inside a push."""
        if self.is_pushing():
            raise MpiddpError("this cannot be done inside a push (a signal handler, __del__ or a hook)")

        def changed() -> bool:
            change()
            return True

        while self.inspect(changed) is None:
            time.sleep(_ATTEMPT_S)

    def _advance(self) -> bool:
        moved = False
        for channel in self.channels:
            if channel.advance():
                moved = True
        return moved

    @uncompiled
    def wait(self, handle: Handle) -> Any:
        """Push until ``handle`` is done; return its result or raise its error."""
        if not handle.done:
            if not self._may_any_thread or self._owner is not None:
                self._check_may_wait(handle.name)
            self._wait(lambda: handle.done, math.inf)
        if handle.error is not None:
            raise handle.error
        if handle.passage is not None:
            handle.passage.land()
        return handle.result

    @uncompiled
    def wait_until(self, done: Callable[[], bool], what: str, timeout_s: float | None = None) -> bool:
        """Push until ``done()``; False if that took longer than ``timeout_s``."""
        self._check_may_wait(what)
        return self._wait(done, math.inf if timeout_s is None else timeout_s)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Within it the calling thread, which may push, does so until all is done: threads that MPI does not let in may
        wait meanwhile."""
        before, self._is_served = self._is_served, True
        try:
            yield
        finally:
            self._is_served = before

    def _check_may_wait(self, what: str) -> None:
        if self.is_pushing():
            raise MpiddpError(f"cannot wait for {what} from inside a push (a signal handler, __del__ or a hook)")
        if not self.may_push() and not self._is_served:
            raise MpiddpError(
                f"cannot wait for {what} in thread {threading.current_thread().name!r}: MPI was started at thread "
                f"level {self._thread_level!r}, which lets only the main thread in; wait there, or start MPI at level "
                "'multiple'"
            )

    def _wait(self, done: Callable[[], bool], timeout_s: float) -> bool:
        begun_s = time.monotonic()
        self.presence.phase(WAITING, begun_s)
        try:
            return self._climb(done, begun_s, begun_s + timeout_s)
        finally:
            self.presence.phase(COMPUTING, self.last_push_s)

    def _climb(self, done: Callable[[], bool], begun_s: float, deadline_s: float) -> bool:
        waiting, spins = ladder_for(begun_s, self._is_between_hosts, self._bell), 0
        while not done():
            if self.push():
                waiting.moved(self.last_push_s)
                spins = 0
                continue
            spins += 1
            if spins < waiting.spins:
                continue
            now = time.monotonic()
            if now > deadline_s:
                return False
            if waiting.rest(now):
                spins = 0
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
