"""Ctrl-C and SIGTERM: never in the midst of a push, then as the user has it, else a clean end."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any

from ..log import logger
from .ending import Rank

__all__ = ["Signals"]

_WATCHED = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """Handlers in the places of those that were there, which are called when the time is right.

    State: ``_pending``, the signals that came while ``is_pushing()``. A deque: handlers append, and whoever acts pops.
    """

    def __init__(self, rank: Rank, is_pushing: Callable[[], bool]) -> None:
        self.rank, self.is_pushing = rank, is_pushing
        self.previous: dict[int, Any] = {}
        self.is_ending = False
        self._pending: deque[int] = deque()
        self._handler = self._receive
        if threading.current_thread() is not threading.main_thread():
            logger.debug("init() was not called in the main thread: Ctrl-C and SIGTERM stay as they were")
            return
        for number in _WATCHED:
            previous = signal.getsignal(number)
            if previous is not signal.SIG_IGN and previous is not None:  # nohup; a handler that is not Python's
                self.previous[number] = previous
                signal.signal(number, self._handler)

    def remove(self) -> None:
        """Put back the handlers that were there, where ours are still in place; only in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, previous in self.previous.items():
            if signal.getsignal(number) == self._handler:
                signal.signal(number, previous)

    def pending(self) -> bool:
        """Whether a signal waits for the end of a push."""
        return bool(self._pending)

    def act_on_pending(self) -> None:
        """Act on what came during a push. Python's handlers belong to the main thread: another one passes it on."""
        while self._pending:
            try:
                number = self._pending.popleft()
            except IndexError:
                return  # another thread was faster
            if threading.current_thread() is threading.main_thread():
                self._act(number, None)
            else:
                signal.pthread_kill(threading.main_thread().ident or 0, number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.rank.is_here() and self.is_pushing():
            self._pending.append(number)
        else:
            self._act(number, frame)

    def _act(self, number: int, frame: FrameType | None) -> None:
        previous = self.previous[number]
        if callable(previous):  # the user's, or Python's own, which raises KeyboardInterrupt
            previous(number, frame)
        elif not self.rank.is_here():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        else:
            self._terminate(number)

    def _terminate(self, number: int) -> None:
        """What the default action does, with the script's ``finally`` clauses run and the other ranks taken along."""
        if self.is_ending:
            return  # a second one changes nothing
        # Nothing is said: when a rank fails the launcher sends SIGTERM to all others, whose words would bury its own.
        self.is_ending = True
        self.rank.end_later(128 + number)
        raise SystemExit(128 + number)
