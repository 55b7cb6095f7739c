"""Tensors in memory that this rank has made and the other ranks of its node can map.

Large tensors have a segment each; small ones share segments, one behind the other, and a segment goes when all that
lie in it are gone. A tensor keeps its mapping alive by itself: it can be read after ``shutdown()``.

State: changed by whoever makes a tensor, and by whoever drops the last reference to one, at any time and in any thread.
So what a finalizer does is atomic (a deque's append, a dict's pop), and ``_tidy`` does the rest under a lock that is
only ever tried where the thread may hold it.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .mapping import Place, SharedFiles, map_file

__all__ = ["Segments"]

#: Tensors up to here share segments of so many bytes: each segment costs a descriptor.
_SMALL_NBYTES = 1 << 20
_SHARED_NBYTES = 4 << 20

#: Tensors begin at multiples of this, so that no cache line holds parts of two.
_ALIGN = 128
_PAGE = 4096

_NOTHING = np.empty(0, np.uint8)


class _Segment:
    __slots__ = ("content", "fd", "filled", "memory", "nbytes", "number", "tensors")

    def __init__(self, number: int, fd: int, memory: Any, nbytes: int) -> None:
        self.number, self.fd, self.memory, self.nbytes = number, fd, memory, nbytes
        self.content: np.ndarray[Any, Any] = np.frombuffer(memory, np.uint8)
        self.filled = 0  # bytes that have been given out
        self.tensors = 0  # that live


class Segments:
    """``files`` is the way to share memory that the node's ranks have agreed on; None: no memory is shared.

    ``when_freed`` is told the number of each segment that is gone.
    """

    def __init__(self, files: SharedFiles | None, when_freed: Callable[[int], None] = lambda number: None) -> None:
        self.files = files
        self._when_freed = when_freed
        self._pid = os.getpid()
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._filling: _Segment | None = None
        self._tensors: dict[int, tuple[_Segment, int]] = {}  # by address: the segment, and the place in it
        self._dead: deque[_Segment] = deque()  # the segment of each tensor that died and was not yet counted
        self._open: dict[int, _Segment] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor, of zeros as it happens; in ordinary memory where none can be shared, or none is left."""
        numel = math.prod(shape)
        nbytes = numel * dtype.itemsize
        if self.files is None or nbytes == 0 or os.getpid() != self._pid:
            return torch.zeros(shape, dtype=dtype, device="cpu")
        try:
            piece = self._piece(nbytes)
        except OSError:
            return torch.zeros(shape, dtype=dtype, device="cpu")
        return torch.frombuffer(piece, dtype=dtype, count=numel).view(shape)

    def place(self, flat: torch.Tensor) -> Place | None:
        """Where the content of a contiguous tensor lies; None if it is in memory that nobody else can map."""
        address = base = flat.data_ptr()
        found = self._tensors.get(base)  # mostly it is a whole one
        if found is None:
            base = flat.untyped_storage().data_ptr()
            found = self._tensors.get(base)
            if found is None:
                return None
        segment, offset = found
        return segment.number, self._pid, segment.fd, segment.nbytes, offset + address - base

    def content(self, number: int) -> np.ndarray[Any, Any]:
        """The bytes of a segment that is in use."""
        return self._open[number].content

    def _piece(self, nbytes: int) -> memoryview:
        with self._lock:
            segment = self._segment_for(nbytes)
            offset = segment.filled
            piece = memoryview(segment.memory).cast("B")[offset : offset + nbytes]
            address = ctypes.addressof(segment.memory) + offset
            segment.filled = offset + -(-nbytes // _ALIGN) * _ALIGN
            segment.tensors += 1
            self._tensors[address] = segment, offset
        weakref.finalize(piece, self._died, address, segment).atexit = False
        self._tidy()
        return piece

    def _segment_for(self, nbytes: int) -> _Segment:
        if nbytes > _SMALL_NBYTES:
            return self._create(nbytes)
        filling = self._filling
        if filling is None or filling.filled + nbytes > filling.nbytes:
            self._filling = self._create(_SHARED_NBYTES)
            if filling is not None and filling.tensors == 0:
                self._close(filling)
        assert self._filling is not None
        return self._filling

    def _create(self, nbytes: int) -> _Segment:
        assert self.files is not None
        nbytes = -(-nbytes // _PAGE) * _PAGE
        number = next(self._numbers)
        fd = self.files.create(number, nbytes)
        try:
            memory = map_file(fd, nbytes)
        except OSError:
            os.close(fd)
            self.files.remove(number)
            raise
        segment = self._open[number] = _Segment(number, fd, memory, nbytes)
        return segment

    def _died(self, address: int, segment: _Segment) -> None:
        self._tensors.pop(address, None)
        self._dead.append(segment)
        self._tidy()

    def _tidy(self) -> None:
        """Close the segments in which nothing lives any more; in a forked child they are the parent's."""
        while self._dead and os.getpid() == self._pid and self._lock.acquire(blocking=False):
            try:
                while self._dead:
                    segment = self._dead.popleft()
                    segment.tensors -= 1
                    if segment.tensors == 0 and segment is not self._filling:
                        self._close(segment)
            finally:
                self._lock.release()

    def _close(self, segment: _Segment) -> None:
        if self._open.pop(segment.number, None) is not None:
            os.close(segment.fd)
            if self.files is not None:
                self.files.remove(segment.number)
            segment.memory = None
            segment.content = _NOTHING
            self._when_freed(segment.number)

    def close(self) -> None:
        """Nobody will map anything of this any more; the tensors that live stay readable."""
        with self._lock:
            self.files, files = None, self.files
            for segment in list(self._open.values()):
                self._open.pop(segment.number)
                os.close(segment.fd)
                if files is not None:
                    files.remove(segment.number)
            self._tensors.clear()
            self._filling = None

    def __repr__(self) -> str:
        nbytes = sum(segment.nbytes for segment in list(self._open.values()))
        return f"Segments({len(self._open)} of {nbytes / (1 << 20):.1f} MiB, {len(self._tensors)} tensors)"
