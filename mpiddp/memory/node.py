"""The memory of a node's ranks, as one of them sees it: its own segments, and its peers' mapped when they are needed.

Which way memory is shared, if any, is agreed by all ranks of the node, after each has read what every other wrote.
"""

from __future__ import annotations

import os
import platform
import secrets
import threading
from collections import OrderedDict, deque
from typing import Any

import numpy as np
import torch

from ..log import logger
from .mapping import MemoryFiles, NamedFiles, Place, SharedFiles, map_file, open_and_map, orders_writes
from .segments import Segments
from .shared import HEADER_NBYTES, share

__all__ = ["LOG_WORDS", "NodeMemory"]

#: Of each rank, a count of the segments that it has freed, and the numbers of the last ones.
LOG_WORDS = 64
_TOKEN_NBYTES = 16

#: Mappings of one peer's segments that are kept; beyond that the one longest unused goes.
_MOST_MAPPINGS = 256


class NodeMemory:
    """``log`` has LOG_WORDS 64-bit words a rank of the node, which all of them map."""

    def __init__(self, files: SharedFiles | None, log: memoryview, rank: int, size: int) -> None:
        self.segments = Segments(files, self._note_freed)
        self.rank, self.size = rank, size
        self._files = files
        self._log = log
        self._freed: deque[int] = deque()  # own segments that the log does not tell of yet
        self._writing = threading.Lock()
        self._seen = [0] * size
        self._mapped: list[OrderedDict[int, np.ndarray[Any, Any]]] = [OrderedDict() for _ in range(size)]

    @classmethod
    def over(cls, comm: Any) -> NodeMemory:
        """For the ranks of ``comm``, which are all those of a node. Collective."""
        if comm.size == 1:
            return cls.alone()
        log = share(comm, HEADER_NBYTES + 8 * LOG_WORDS * comm.size) if orders_writes() else None
        files = _agreed_files(comm) if log is not None else None
        if comm.rank == 0 and not isinstance(files, MemoryFiles):
            _say(files)
        if log is None or files is None:
            return cls.alone()
        return cls(files, memoryview(log)[HEADER_NBYTES:].cast("q"), comm.rank, comm.size)

    @classmethod
    def alone(cls) -> NodeMemory:
        """Memory that is shared with nobody."""
        return cls(None, memoryview(bytearray(8 * LOG_WORDS)).cast("q"), 0, 1)

    @property
    def is_shared(self) -> bool:
        """Whether the ranks of this node can map each other's tensors: the same on all of them."""
        return self._files is not None

    @property
    def is_lazy(self) -> bool:
        """Whether shared memory is taken when it is first touched, not when it is made."""
        return isinstance(self._files, MemoryFiles)

    def tensor(self, rank: int, place: Place, nbytes: int) -> torch.Tensor:
        """:meth:`content` as a tensor. Cost: 1 us more."""
        return torch.from_numpy(self.content(rank, place, nbytes))

    def content(self, rank: int, place: Place, nbytes: int) -> np.ndarray[Any, Any]:
        """So many bytes at ``place``. ``rank`` is its owner's among the node's.

        OSError where it cannot be mapped. Cost: 0.5 us, and where it was not mapped yet 20 us and the page faults.
        """
        number, pid, fd, of_segment, offset = place
        if rank == self.rank:
            return self.segments.content(number)[offset : offset + nbytes]
        mapped = self._mapped[rank]
        whole = mapped.get(number)
        if whole is None:
            assert self._files is not None
            self._drop_freed(rank)
            whole = np.frombuffer(open_and_map(self._files.path(pid, fd, number), of_segment), dtype=np.uint8)
            mapped[number] = whole
            if len(mapped) > _MOST_MAPPINGS:
                mapped.popitem(last=False)
        else:
            mapped.move_to_end(number)
        return whole[offset : offset + nbytes]

    def drop_freed(self) -> None:
        """Unmap what the peers have freed. Cost: 0.1 us a rank when there is nothing."""
        for rank in range(self.size):
            if self._log[rank * LOG_WORDS] != self._seen[rank]:
                self._drop_freed(rank)
        if self._freed:
            self._write_log()

    def _drop_freed(self, rank: int) -> None:
        at, ring = rank * LOG_WORDS, LOG_WORDS - 1
        count, mapped = self._log[at], self._mapped[rank]
        if count - self._seen[rank] >= ring:  # told of too many to know them all
            mapped.clear()
        else:
            for index in range(self._seen[rank], count):
                mapped.pop(self._log[at + 1 + index % ring], None)
        self._seen[rank] = count

    def _note_freed(self, number: int) -> None:
        self._freed.append(number)
        self._write_log()

    def _write_log(self) -> None:
        at, ring = self.rank * LOG_WORDS, LOG_WORDS - 1
        if not self._writing.acquire(blocking=False):
            return  # who holds it writes this, too, or the next exchange does
        try:
            while self._freed:
                count = self._log[at]
                self._log[at + 1 + count % ring] = self._freed.popleft()
                self._log[at] = count + 1
        finally:
            self._writing.release()

    def close(self) -> None:
        """No exchange comes any more. Tensors stay readable."""
        self.segments.close()
        for mapped in self._mapped:
            mapped.clear()

    def __repr__(self) -> str:
        way = type(self._files).__name__ if self._files else "nothing shared"
        return f"NodeMemory(rank {self.rank} of {self.size}, {way}, {self.segments!r})"


def _agreed_files(comm: Any) -> SharedFiles | None:
    """The first way in which every rank can read what every other wrote."""
    job = comm.bcast(secrets.token_hex(8) if comm.rank == 0 else None, 0)
    for way in (MemoryFiles, lambda: NamedFiles(job)):
        files, own, why = None, None, ""
        try:
            files = way()
            own = _Token(files)
        except (OSError, AttributeError) as error:  # AttributeError: no memfd_create on this system
            why = str(error)
        tickets = comm.allgather(own.ticket if own else None)
        why = why or _unreadable(files, tickets)
        reasons = comm.allgather(why)
        if own is not None:
            own.remove()
        if not any(reasons):
            return files
        logger.debug("no shared memory by %s: %s", way, next(reason for reason in reasons if reason))
    return None


class _Token:
    """A small file with a random content, and what a peer needs to check it."""

    def __init__(self, files: SharedFiles) -> None:
        self._files, self._fd = files, files.create(0, _TOKEN_NBYTES)
        self._memory = map_file(self._fd, _TOKEN_NBYTES)
        token = secrets.token_bytes(_TOKEN_NBYTES)
        self._memory.raw = token
        self.ticket = os.getpid(), self._fd, token

    def remove(self) -> None:
        os.close(self._fd)
        self._files.remove(0)


def _unreadable(files: SharedFiles | None, tickets: list[tuple[int, int, bytes] | None]) -> str:
    """Why some rank's token cannot be read; empty if all can."""
    for rank, ticket in enumerate(tickets):
        if ticket is None or files is None:
            return f"local rank {rank} can make no such file"
        pid, fd, token = ticket
        path = files.path(pid, fd, 0)
        try:
            if open_and_map(path, _TOKEN_NBYTES).raw != token:
                return f"{path} is not the file of local rank {rank}"
        except OSError as error:
            return f"the file of local rank {rank} cannot be mapped: {error}"
    return ""


def _say(files: SharedFiles | None) -> None:
    if not orders_writes():
        logger.info(
            "this processor (%s) may show writes out of order, so the ranks of this node exchange through MPI, not "
            "through shared memory",
            platform.machine(),
        )
    elif files is None:
        logger.warning(
            "the ranks of this node cannot share memory, so exchanges between them go through MPI and are several "
            "times slower: let processes of one user open each other's /proc/<pid>/fd (in containers, one PID "
            "namespace for all ranks), or give them one large /dev/shm"
        )
    else:
        logger.info(
            "the ranks of this node share memory in /dev/shm, whose size bounds that of tensors made by mpiddp.empty() "
            "and of gradient buckets, since /proc/<pid>/fd is closed to them"
        )
