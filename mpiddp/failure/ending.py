"""The end of a rank: say why, in one piece, then abort the job."""

from __future__ import annotations

import array
import contextlib
import dataclasses
import fcntl
import io
import os
import signal
import socket
import stat
import sys
import termios
import threading
import time
from collections.abc import Callable

__all__ = ["GRACE_S", "Rank", "is_interactive", "say"]

#: What is still running after this time is cut off, so that the job is over 2 s after its first failure. In seconds.
GRACE_S = 1.0

#: An abort makes the launcher close its end of our pipes, read or not: it has this long to read the last words from
#: them, and then to pass them on. None were lost without this on an idle node; it is for busy ones. In seconds.
_READ_S, _PASS_ON_S = 0.5, 0.05


@dataclasses.dataclass(frozen=True)
class Rank:
    """This rank, and how the job is aborted (``abort(exit_code)``, which does not return)."""

    rank: int
    size: int
    abort: Callable[[int], None]
    pid: int = dataclasses.field(default_factory=os.getpid)
    host: str = dataclasses.field(default_factory=socket.gethostname)
    _ending: threading.Lock = dataclasses.field(default_factory=threading.Lock, repr=False)

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size} on host {self.host}"

    def is_here(self) -> bool:
        """Whether this process is the rank itself, not a forked child of it."""
        return os.getpid() == self.pid

    def end(self, code: int, text: str = "") -> None:
        """Say ``text``, flush what the rank has written, and abort the job with ``code`` (1-255). Does not return."""
        if not self._ending.acquire(blocking=False):
            time.sleep(GRACE_S)  # another thread is at it; it takes this one along
        with contextlib.suppress(ValueError):  # raised by signal.signal outside the main thread
            # Nothing may come between: the launcher sends SIGTERM when another rank has failed as well.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            # An abort that hangs ends by the kernel's hand: a killed rank makes the launcher end the job, too.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, GRACE_S)
        say(text)
        _wait_for_readers()
        try:
            self.abort(code)
        finally:
            os._exit(code)

    def end_later(self, code: int) -> None:
        """Abort the job with ``code`` unless the rank has ended by itself within ``GRACE_S``."""

        def wait() -> None:
            time.sleep(GRACE_S)
            self.end(code)

        threading.Thread(target=wait, name="mpiddp-end", daemon=True).start()


def say(text: str) -> None:
    """``text`` to stderr in one write, so that ranks do not interleave their lines; both streams flushed.

    A hook over ours may have a buffer in the place of stderr, to write it out when we return, which we do not
    (torch.distributed puts one there at init_process_group()): then the process's own stderr has the text, too.
    """
    streams = [(sys.stdout, ""), (sys.stderr, text)]
    if isinstance(sys.stderr, io.StringIO):
        streams.append((sys.__stderr__, text))
    for stream, words in streams:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, broken or None: nobody reads it
            stream.write(words)
            stream.flush()


def _wait_for_readers() -> None:
    until = time.monotonic() + _READ_S
    while time.monotonic() < until and any(_unread(fd) for fd in (1, 2)):
        time.sleep(0.001)
    time.sleep(_PASS_ON_S)


def _unread(fd: int) -> int:
    """The bytes that wait in a pipe or a terminal to be read at its other end; 0 for anything else."""
    count = array.array("i", [0])
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, termios.TIOCOUTQ if os.isatty(fd) else termios.FIONREAD, count)
        # A file answers FIONREAD with what lies behind its position: nobody is going to read that.
        return count[0] if os.isatty(fd) or stat.S_ISFIFO(os.fstat(fd).st_mode) else 0
    return 0


def is_interactive() -> bool:
    """A prompt: an exception there goes back to the user, who goes on."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)
