"""Uncaught exceptions: of the main thread and of the library's own threads. The user's hooks are called first."""

from __future__ import annotations

import sys
import threading
import traceback
from pathlib import Path
from types import TracebackType

from .ending import Rank, is_interactive, say

__all__ = ["Hooks"]

#: Threads of the library have names that begin with this; those of others end as in any Python program.
THREAD_PREFIX = "mpiddp"
#: The exit code of a program that Ctrl-C has ended: 128 + SIGINT.
_INTERRUPTED = 130


class Hooks:
    """Replaces ``sys.excepthook`` and ``threading.excepthook`` until :meth:`remove`."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.previous, self.previous_thread = sys.excepthook, threading.excepthook
        # Bound methods are made anew at each look: these very objects are what remove() compares with.
        self._main, self._thread = self.uncaught, self.uncaught_in_thread
        sys.excepthook, threading.excepthook = self._main, self._thread

    def remove(self) -> None:
        """Put back what was there, unless somebody has put a hook of their own in the place of ours."""
        if sys.excepthook is self._main:
            sys.excepthook = self.previous
        if threading.excepthook is self._thread:
            threading.excepthook = self.previous_thread

    def uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """``sys.excepthook``."""
        if not self.rank.is_here() or is_interactive():
            self.previous(kind, error, trace)
            return
        if issubclass(kind, KeyboardInterrupt):
            self.rank.end(_INTERRUPTED, f"{self.rank} was interrupted{_place(trace)}; the job ends\n")
        header = f"uncaught exception on {self.rank}; the job ends\n"
        if self.previous is sys.__excepthook__:
            self.rank.end(1, header + "".join(traceback.format_exception(kind, error, trace)))
        try:
            say(header)
            self.previous(kind, error, trace)
        finally:
            self.rank.end(1)

    def uncaught_in_thread(self, args: threading.ExceptHookArgs) -> None:
        """``threading.excepthook``; SystemExit ends a thread and nothing else, as always."""
        name = args.thread.name if args.thread is not None else ""
        ours = name.startswith(THREAD_PREFIX) and not issubclass(args.exc_type, SystemExit)
        if not ours or not self.rank.is_here():
            self.previous_thread(args)
            return
        lines = traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback)
        self.rank.end(1, f"uncaught exception in thread {name} of {self.rank}; the job ends\n" + "".join(lines))


def _place(trace: TracebackType | None) -> str:
    """Where the innermost frame stood, of those outside this package, which passes Ctrl-C on."""
    frames = [f for f in traceback.extract_tb(trace) if Path(f.filename).parent != Path(__file__).parent]
    return f" at {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
