"""Small messages between a coordinator and the members on its node, through memory that they share.

Two rings a member, one each way: a stream of bytes with one writer and one reader, each of whom owns one counter. A
message costs 1 us and no system call, against 10 us by MPI. Whatever does not fit waits with the sender, as a message
that MPI has not taken yet would.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import TYPE_CHECKING, Any

from ..memory.mapping import orders_writes
from ..memory.shared import HEADER_NBYTES, share
from .control import MpiPort, Port

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Inbox", "NodePort", "Outbox", "control_port"]

#: A ring: the writer's counter, the reader's in a cache line of its own, then the bytes.
_WRITTEN, _READ, _DATA_AT = 0, 8, 128
_CAPACITY = 64 << 10
RING_NBYTES = _DATA_AT + _CAPACITY

_length = struct.Struct("q")


class Outbox:
    """The writer's end of a ring. ``memory`` has ``RING_NBYTES`` bytes, zeros at first."""

    __slots__ = ("_counters", "_data", "_queue", "_written")

    def __init__(self, memory: memoryview) -> None:
        self._counters = memory[:_DATA_AT].cast("q")
        self._data = memory[_DATA_AT:]
        self._written = 0
        self._queue: deque[memoryview] = deque()

    def send(self, message: bytes) -> bool:
        """Write ``message``, or keep what does not fit; True if nothing is left."""
        framed = _length.pack(len(message)) + message
        start, end = self._written % _CAPACITY, self._written % _CAPACITY + len(framed)
        room = _CAPACITY - self._written + self._counters[_READ]
        if len(framed) <= room and end <= _CAPACITY and not self._queue:
            self._data[start:end] = framed
            self._written += len(framed)
            self._counters[_WRITTEN] = self._written
            return True
        self._queue.append(memoryview(framed))
        return self.flush()

    def flush(self) -> bool:
        """Write what fits of what was kept; True if nothing is left."""
        while self._queue:
            piece = self._queue[0]
            start = self._written % _CAPACITY
            room = min(_CAPACITY - self._written + self._counters[_READ], _CAPACITY - start)
            if not room:
                return False
            taken = piece[:room]
            self._data[start : start + len(taken)] = taken
            self._written += len(taken)
            self._counters[_WRITTEN] = self._written
            if len(taken) == len(piece):
                self._queue.popleft()
            else:
                self._queue[0] = piece[len(taken) :]
        return True


class Inbox:
    """The reader's end of a ring."""

    __slots__ = ("_counters", "_data", "_read", "_received", "_wanted")

    def __init__(self, memory: memoryview) -> None:
        self._counters = memory[:_DATA_AT].cast("q")
        self._data = memory[_DATA_AT:]
        self._read = 0
        self._received = bytearray()  # of a message that has come in part
        self._wanted = 0

    def poll(self) -> bytes | None:
        """The next message, or None."""
        there = self._counters[_WRITTEN] - self._read
        if not there:
            return None
        if not self._wanted:
            start = self._read % _CAPACITY
            if there >= 8 and start + 8 <= _CAPACITY:
                end = start + 8 + _length.unpack_from(self._data, start)[0]
                if end <= _CAPACITY and end - start <= there:  # all of it lies here in one piece
                    message = bytes(self._data[start + 8 : end])
                    self._read += end - start
                    self._counters[_READ] = self._read
                    return message
        return self._gather(there)

    def _gather(self, there: int) -> bytes | None:
        """Take what is there of a message that goes around the ring's end, or is larger than what was there."""
        while there:
            if not self._wanted and len(self._received) == 8:
                self._wanted = 8 + int(_length.unpack(self._received)[0])
            start = self._read % _CAPACITY
            nbytes = min(there, (self._wanted or 8) - len(self._received), _CAPACITY - start)
            self._received += self._data[start : start + nbytes]
            self._read += nbytes
            self._counters[_READ] = self._read
            there -= nbytes
            if not self._wanted and len(self._received) == 8:
                self._wanted = 8 + int(_length.unpack(self._received)[0])
            if self._wanted and len(self._received) == self._wanted:
                message = bytes(self._received[8:])
                self._received.clear()
                self._wanted = 0
                return message
        return None


class NodePort:
    """A port whose messages to the peers in ``outboxes`` go through shared memory, and all others by ``beyond``.

    ``has_others``: whether anybody may send by ``beyond``.
    """

    __slots__ = ("_beyond", "_full", "_has_others", "_inboxes", "_outboxes", "leaving")

    def __init__(
        self, beyond: Port, inboxes: dict[int, Inbox], outboxes: dict[int, Outbox], has_others: bool = True
    ) -> None:
        self._beyond = beyond
        self._has_others = has_others
        self._inboxes = list(inboxes.items())
        self._outboxes = outboxes
        self._full: list[Outbox] = []
        self.leaving = False

    def send(self, peer: int, message: bytes) -> None:
        """See :class:`~mpiddp.transport.control.Port`."""
        outbox = self._outboxes.get(peer)
        if outbox is None:
            self._beyond.send(peer, message)
            self.leaving |= self._beyond.leaving
        elif not outbox.send(message) and outbox not in self._full:
            self._full.append(outbox)
            self.leaving = True

    def poll(self) -> tuple[int, bytes] | None:
        """See :class:`~mpiddp.transport.control.Port`."""
        for peer, inbox in self._inboxes:
            message = inbox.poll()
            if message is not None:
                return peer, message
        return self._beyond.poll() if self._has_others else None

    def flush(self) -> None:
        """See :class:`~mpiddp.transport.control.Port`."""
        self._full = [outbox for outbox in self._full if not outbox.flush()]
        if self._beyond.leaving:
            self._beyond.flush()
        self.leaving = bool(self._full) or self._beyond.leaving


def control_port(comm: MPI.Intracomm, node_comm: MPI.Intracomm) -> Port:
    """The port of a process set over ``comm``; ``node_comm`` has those of its members that share this rank's node.

    Collective over both. Through shared memory where the node has the coordinator, member 0, and shares any.
    """
    port = MpiPort(comm)
    members: list[int] = node_comm.allgather(comm.rank)
    if 0 not in members or len(members) == 1 or not _agree_on_order(node_comm):
        return port
    members.remove(0)
    memory: Any = share(node_comm, HEADER_NBYTES + 2 * len(members) * RING_NBYTES)
    if memory is None:
        return port
    starts = range(HEADER_NBYTES, HEADER_NBYTES + 2 * len(members) * RING_NBYTES, RING_NBYTES)
    rings = [memoryview(memory)[start : start + RING_NBYTES] for start in starts]
    up, down = dict(zip(members, rings[::2], strict=True)), dict(zip(members, rings[1::2], strict=True))
    if comm.rank == 0:
        inboxes = {member: Inbox(ring) for member, ring in up.items()}
        outboxes = {member: Outbox(ring) for member, ring in down.items()}
        return NodePort(port, inboxes, outboxes, has_others=len(members) + 1 < comm.size)
    return NodePort(port, {0: Inbox(down[comm.rank])}, {0: Outbox(up[comm.rank])}, has_others=False)


def _agree_on_order(node_comm: MPI.Intracomm) -> bool:
    """A counter that is written last must say that the bytes before it are there."""
    return all(node_comm.allgather(orders_writes()))
