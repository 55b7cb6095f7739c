"""To sleep until something comes from another host: MPI offers no such wait, but the system does.

Open MPI keeps its TCP connections in an epoll instance, which can itself be polled: it is readable as soon as one of
them is. Nothing is read here, that remains MPI's. Whether what the ranks send comes that way cannot be asked (there may
be an InfiniBand card, or UCX), so it is learnt: a bell that is silent when something comes is not listened to any more.
"""

from __future__ import annotations

import logging
import os
import select
import socket
from pathlib import Path

__all__ = ["Doorbell"]

_log = logging.getLogger("mpiddp")

#: ``select`` knows no larger descriptors. Other than ``poll`` it may be called by several threads at a time.
_MOST_FD = 1023

#: What a bell is trusted with at first and at the most, what it gains when it rings for what comes, and what it loses
#: when something comes without it. That was seen for one wait in fifteen at the most: of messages which MPI takes in
#: while a push asks it for others.
_CREDIT, _MOST_CREDIT, _GAIN, _LOSS = 16, 256, 1, 4


class Doorbell:
    """Rings when MPI has something to read, or can write again what it could not."""

    __slots__ = ("_credit", "_fds", "_has_rung")

    def __init__(self, fds: list[int]) -> None:
        self._fds = [fd for fd in fds if fd <= _MOST_FD]
        self._credit = _CREDIT if self._fds else 0
        self._has_rung = False

    @classmethod
    def of_mpi(cls) -> Doorbell:
        """That of the MPI which has been started here; silent where it has none, or the system does not tell."""
        return cls(_listening())

    @property
    def is_trusted(self) -> bool:
        """Whether it is worth waiting for."""
        return self._credit > 0

    def wait(self, timeout_s: float) -> None:
        """Until it rings, and no longer than this."""
        try:
            self._has_rung = bool(select.select(self._fds, (), (), timeout_s)[0])
        except (OSError, ValueError):  # MPI has closed it
            self._credit = 0

    def came(self) -> None:
        """What was waited for came after the last :meth:`wait`."""
        if self._has_rung:
            self._credit = min(_MOST_CREDIT, self._credit + _GAIN)
            return
        self._credit -= _LOSS
        if not self.is_trusted:
            _log.debug("messages come that Open MPI's TCP connections say nothing of: they are looked for instead")

    def __repr__(self) -> str:
        return f"Doorbell({self._fds}, credit {self._credit})"


def _listening() -> list[int]:
    """The epoll instances of this process that hold a TCP socket which listens: of the TCP BTL, and no client's."""
    try:
        fds = {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}
    except OSError:
        return []
    return sorted(fd for fd in fds if any(map(_is_listening, _watched(fd))))


def _watched(fd: int) -> list[int]:
    """The descriptors in an epoll instance; none where it is no such, or has been closed meanwhile."""
    try:
        if str(Path(f"/proc/self/fd/{fd}").readlink()) != "anon_inode:[eventpoll]":
            return []
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    except OSError:
        return []
    return [int(line.split()[1]) for line in lines if line.startswith("tfd:")]


def _is_listening(fd: int) -> bool:
    try:
        with socket.socket(fileno=os.dup(fd)) as found:
            is_inet = found.family in (socket.AF_INET, socket.AF_INET6)
            return is_inet and bool(found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:  # no socket
        return False
