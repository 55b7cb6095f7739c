"""Small messages of the negotiation, apart from the data: received when they have come, never waited for.

Nothing is posted ahead: a posted receive would have to be withdrawn, and a probe finds what is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["CONTROL_TAG", "MpiPort", "Port"]

#: The smallest upper bound for tags that the MPI standard grants is 32767.
CONTROL_TAG = 32767


class Port(Protocol):
    """Sends and receives messages among the members of a process set.

    ``leaving``: whether something that was sent had not left at the last look.
    """

    leaving: bool

    def send(self, peer: int, message: bytes) -> None:
        """Start to send; messages between one pair arrive in order."""
        ...

    def poll(self) -> tuple[int, bytes] | None:
        """A message that has come and who sent it, or None."""
        ...

    def flush(self) -> None:
        """Look again whether what was sent has left."""
        ...


class MpiPort:
    """A port over a communicator of the library's own."""

    __slots__ = ("_byte", "_comm", "_status", "_under_way", "_wildcard", "leaving")

    def __init__(self, comm: MPI.Intracomm) -> None:
        from mpi4py import MPI

        self._comm = comm
        self._byte = MPI.BYTE
        self._wildcard = MPI.ANY_SOURCE
        self._status = MPI.Status()
        self._under_way: list[MPI.Request] = []
        self.leaving = False

    def send(self, peer: int, message: bytes) -> None:
        """See :class:`Port`."""
        self._under_way.append(self._comm.Isend([message, self._byte], peer, CONTROL_TAG))
        self.flush()

    def poll(self) -> tuple[int, bytes] | None:
        """See :class:`Port`."""
        status = self._status
        if not self._comm.Iprobe(self._wildcard, CONTROL_TAG, status):
            return None
        source = status.source
        message = bytearray(status.Get_count(self._byte))
        self._comm.Recv([message, self._byte], source, CONTROL_TAG)
        return source, bytes(message)

    def flush(self) -> None:
        """See :class:`Port`."""
        self._under_way = [request for request in self._under_way if not request.Test()]
        self.leaving = bool(self._under_way)
