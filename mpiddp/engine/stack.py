"""The Python stack of a rank that may hold the GIL: written by a signal handler in C, read by a peer on its node.

State: ``_installed``, the signal and the file of this process, from :func:`install` to :func:`uninstall`.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..log import logger

if TYPE_CHECKING:
    from .presence import Seen

__all__ = ["install", "of_main_thread", "of_peer", "start_time", "uninstall"]

#: How long a peer's handler may take to begin and to end; it needs no GIL, but a CPU.
_BEGIN_S = 1.0
_QUIET_S = 0.05
_MOST_LINES = 25

#: Threads of the library itself are not what somebody waits for.
_OWN_THREAD = "/engine/liveness.py"
_REPORTING = ("/engine/stack.py", "/engine/missing.py", "/engine/stall.py")

_installed: tuple[int, IO[bytes]] | None = None


def install() -> tuple[int, int] | None:
    """From now on a signal makes this process write its stacks; the signal, and the descriptor of the file.

    The file is nameless: peers reach it through ``/proc``, and nothing is left behind. None where no signal is free.
    """
    global _installed
    uninstall()
    number = _free_signal()
    if number is None:
        logger.debug("no real-time signal is free: stall reports have no stack of this rank")
        return None
    file = _nameless_file()
    faulthandler.register(number, file, all_threads=True)
    _installed = number, file
    return number, file.fileno()


def _nameless_file() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("mpiddp-stacks"), "w+b")
    fd, path = tempfile.mkstemp(prefix="mpiddp-stacks-")
    Path(path).unlink()
    return os.fdopen(fd, "w+b")


def uninstall() -> None:
    """Give the signal back."""
    global _installed
    if _installed is not None:
        number, file = _installed
        _installed = None
        faulthandler.unregister(number)
        file.close()


def _free_signal() -> int | None:
    """A real-time signal that nobody in this process handles, ignores or blocks; high, since programs take low ones."""
    if not hasattr(signal, "SIGRTMAX"):
        return None
    taken = _masks(os.getpid(), ("SigCgt", "SigIgn", "SigBlk"))
    if taken is None:
        return None
    for number in range(signal.SIGRTMAX - 1, signal.SIGRTMIN, -1):
        if not taken >> (number - 1) & 1 and signal.getsignal(number) == signal.SIG_DFL:
            return number
    return None


def _masks(pid: int, names: tuple[str, ...]) -> int | None:
    """The union of some of a process's signal masks; None where /proc does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except OSError:
        return None
    return _union(int(line.split()[1], 16) for line in lines if line.startswith(names))


def _union(masks: Any) -> int:
    union = 0
    for mask in masks:
        union |= mask
    return union


def of_peer(peer: Seen) -> list[str]:
    """The lines of the stack of a rank on this node, innermost call first; empty where it cannot be had.

    The signal is sent only to the very process that offered it, and only while it handles it: to another one it could
    be deadly. A system call that the peer is in may return early with EINTR, which Python itself hides.
    """
    if not peer.signal or not peer.is_alive:
        return []
    try:
        with Path(f"/proc/{peer.pid}/fd/{peer.stacks_fd}").open("rb") as file:
            before = file.seek(0, os.SEEK_END)
            if not _send(peer):
                return []
            return _main_thread(_growing(file, before))
    except OSError:
        return []


def start_time(pid: int) -> int:
    """When a process was started, in the kernel's ticks: with its id, who it is. -1 if it has ended, or is unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return -1
    return -1 if fields[0] in "ZX" else int(fields[19])


def _send(peer: Seen) -> bool:
    process = os.pidfd_open(peer.pid) if hasattr(os, "pidfd_open") else None
    try:
        handled = _masks(peer.pid, ("SigCgt",))
        if not handled or not handled >> (peer.signal - 1) & 1 or start_time(peer.pid) == -1:
            return False
        if process is not None and hasattr(signal, "pidfd_send_signal"):
            signal.pidfd_send_signal(process, peer.signal)  # never another process that got the same id meanwhile
        else:
            os.kill(peer.pid, peer.signal)
    finally:
        if process is not None:
            os.close(process)
    return True


def _growing(file: IO[bytes], before: int) -> str:
    """What is written from ``before`` on, once it has begun and come to a rest."""
    deadline_s, size, since_s = time.monotonic() + _BEGIN_S, before, time.monotonic()
    while (now := time.monotonic()) < deadline_s:
        end = file.seek(0, os.SEEK_END)
        if end != size:
            size, since_s = end, now
        elif size > before and now - since_s > _QUIET_S:
            break
        time.sleep(0.005)
    file.seek(before)
    return file.read(size - before).decode(errors="replace")


def _main_thread(dump: str) -> list[str]:
    """The stack of the oldest thread, which faulthandler writes last, leaving out the library's own threads."""
    threads = [part.splitlines()[1:] for part in dump.strip().split("\n\n") if part]
    threads = [lines for lines in threads if lines and not any(_OWN_THREAD in line for line in lines)]
    return [line.strip() for line in threads[-1][:_MOST_LINES]] if threads else []


def of_main_thread() -> list[str]:
    """The same of this process, without the frames that make the report."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and frame.f_code.co_filename.endswith(_REPORTING):
        frame = frame.f_back
    stack = traceback.extract_stack(frame)[::-1] if frame is not None else []
    return [f'File "{entry.filename}", line {entry.lineno} in {entry.name}' for entry in stack[:_MOST_LINES]]
