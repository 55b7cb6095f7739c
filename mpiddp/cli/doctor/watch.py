"""A doctor must not hang with the patient: after a while without an answer, what is known is said, and it ends."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from .facts import Facts

__all__ = ["Watch"]


class Watch:
    """``phase`` says what is being done, ``known`` what this rank knows by then. After ``timeout_s`` ``tell(watch)``
    speaks, and the process ends with 2.

    A thread of its own waits; MPI's blocking calls let it run.
    """

    def __init__(
        self, timeout_s: float, known: Facts, tell: Callable[[Watch], None], end: Callable[[int], object] = os._exit
    ) -> None:
        self.phase, self.known, self.timeout_s = "starting", known, timeout_s
        self._tell, self._end = tell, end
        self._over = threading.Event()
        threading.Thread(target=self._wait, name="mpiddp-doctor-watch", daemon=True).start()

    def _wait(self) -> None:
        if self._over.wait(self.timeout_s):
            return
        try:
            self._tell(self)
        finally:
            self._end(2)

    def stop(self) -> None:
        """All went well."""
        self._over.set()
