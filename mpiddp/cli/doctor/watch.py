"""A doctor must not hang with the patient: after a while without an answer, what is known is said, and it ends."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

__all__ = ["Watch"]


class Watch:
    """``phase`` says what is being done. After ``timeout_s`` ``tell(phase)`` speaks, and the process ends with 2.

    A thread of its own waits; MPI's blocking calls let it run.
    """

    def __init__(self, timeout_s: float, tell: Callable[[str], None], end: Callable[[int], object] = os._exit) -> None:
        self.phase, self.timeout_s = "starting", timeout_s
        self._tell, self._end = tell, end
        self._started = time.monotonic()
        self._over = threading.Event()
        threading.Thread(target=self._wait, name="mpiddp-doctor-watch", daemon=True).start()

    def _wait(self) -> None:
        if self._over.wait(self.timeout_s):
            return
        try:
            self._tell(self.phase)
        finally:
            self._end(2)

    def stop(self) -> None:
        """All went well."""
        self._over.set()
