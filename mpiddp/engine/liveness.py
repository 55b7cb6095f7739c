"""The thread that pushes when something is in flight and nobody else has for a while.

It sleeps on a semaphore while nothing is in flight. Once woken it looks at intervals, so that a busy engine does not
pay for waking it at every request, and goes back to sleep after a while without work.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .progress import Engine

__all__ = ["Liveness"]

#: Between two pushes of a series, the shortest time for which another thread surely gets the GIL.
_PAUSE_S = 2e-5

#: It stays awake, looking at intervals, for this long after it last saw something in flight.
_LINGER_S = 0.5


#: Asleep, it still looks as often whether others want something of a coordinator here: that somebody has left must be
#: known to all within seconds. A push costs some 10 us.
_LISTEN_S = 1.0


class Liveness:
    """The thread and how it is woken. ``_asleep`` is set by the thread before it sleeps and cleared by who wakes it."""

    def __init__(self, engine: Engine, interval_s: float) -> None:
        self._engine = engine
        self._interval_s = interval_s
        self._asleep = False
        self._stopping = False
        self._wakeup = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mpiddp-liveness", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Something is in flight now. Costs a test where the thread is awake."""
        if self._asleep:
            self._asleep = False
            self._wakeup.set()

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stopping = True
        self._wakeup.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        last_work_s = time.monotonic()
        while not self._stopping:
            now = time.monotonic()
            if self._engine.pending():
                last_work_s = now
                idle_s = now - self._engine.last_push_s
                if idle_s >= self._interval_s:
                    # While the exchange moves, stay with it: a peer waits for us. But let others have the GIL.
                    while self._engine.push() and not self._stopping:
                        time.sleep(_PAUSE_S)
                    idle_s = 0.0
                time.sleep(max(self._interval_s - idle_s, 1e-4))
            elif now - last_work_s < _LINGER_S:
                time.sleep(self._interval_s)
            else:
                self._sleep()
                last_work_s = time.monotonic()

    def _sleep(self) -> None:
        self._wakeup.clear()
        self._asleep = True
        if self._engine.pending():  # submitted between the last look and now
            self._asleep = False
            return
        while not self._wakeup.wait(_LISTEN_S):
            self._engine.listen()
        self._asleep = False
