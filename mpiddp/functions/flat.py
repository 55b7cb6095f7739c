"""Broadcast many tensors of any layout, dtype and device as few flat byte buffers.

The buffers lie in the CPU's memory whatever the tensors' device is: this runs once before training, and so the root's
tensors may live on another kind of device than the receivers'. Bytes, because every dtype has them, and a broadcast
computes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch

from .. import runtime
from ..ops import Handle, broadcast_async_, synchronize
from ..ops.submit import part_name
from ..process_set import ProcessSet, global_process_set

__all__ = ["broadcast_bytes", "broadcast_tensors", "check_root"]

# A window of tensors travels as one buffer. Long enough that the start of a broadcast does not show beside its transfer
# (32 MiB take milliseconds, a start takes microseconds); two of them in flight bound the memory that is used.
WINDOW_NBYTES = 32 << 20
WINDOWS_IN_FLIGHT = 2
# MPI before version 4 counts elements in 32-bit integers; a larger buffer travels in pieces.
PIECE_NBYTES = 1 << 30
# No dtype is larger than a complex128, and a view of bytes as a dtype must begin at a multiple of its size.
ALIGNMENT_NBYTES = 16


def check_root(root_rank: int, members: Sequence[int] | None = None) -> None:
    """Raise ValueError unless ``root_rank`` is one of ``members``, by default of all ranks of the world."""
    if members is None:
        members = range(runtime.size())
    if root_rank not in members:
        ranks = list(members)
        shown = f"between 0 and {ranks[-1]}" if ranks == list(range(len(ranks))) else f"one of {ranks}"
        raise ValueError(f"root_rank must be {shown}, not {root_rank}")


@torch.no_grad()
def broadcast_tensors(tensors: Iterable[torch.Tensor], root_rank: int, name: str) -> None:
    """Overwrite ``tensors`` with those of the root, in place.

    Shapes and dtypes must be the same in the same order on every rank: the caller has checked it. Cost: one broadcast
    for each 32 MiB or larger tensor. All but contiguous ones on the CPU that fill a window are copied into a buffer.
    """
    in_flight: deque[_Window] = deque()
    for number, window in enumerate(_windows(tensors)):
        if len(in_flight) == WINDOWS_IN_FLIGHT:
            in_flight.popleft().finish()
        in_flight.append(_Window(window, root_rank, f"{name}.{number}"))
    while in_flight:
        in_flight.popleft().finish()


def broadcast_bytes(
    flat: torch.Tensor, root_rank: int, name: str | None, process_set: ProcessSet = global_process_set
) -> None:
    """Overwrite ``flat``, a 1-D contiguous uint8 tensor on the CPU, with the root's, of the same length."""
    for handle in _submit(flat, root_rank, name, process_set):
        synchronize(handle)


def _submit(
    flat: torch.Tensor, root_rank: int, name: str | None, process_set: ProcessSet = global_process_set
) -> list[Handle]:
    pieces = torch.split(flat, PIECE_NBYTES) if flat.numel() else ()
    return [
        broadcast_async_(piece, root_rank, part_name(name, f"piece{number}") if number else name, process_set)
        for number, piece in enumerate(pieces)
    ]


def _windows(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    window: list[torch.Tensor] = []
    nbytes = 0
    for tensor in tensors:
        if window and nbytes + tensor.nbytes > WINDOW_NBYTES:
            yield window
            window, nbytes = [], 0
        window.append(tensor)
        nbytes += tensor.nbytes
    if window:
        yield window


class _Window:
    """Tensors that travel as one buffer: submitted when made, and written back by :meth:`finish`."""

    def __init__(self, tensors: Sequence[torch.Tensor], root_rank: int, name: str) -> None:
        self._tensors = tensors
        self._root = root_rank
        self._packed = len(tensors) > 1 or not _lies_as_it_is(tensors[0])
        self._flat = self._pack() if self._packed else tensors[0].detach().reshape(-1).view(torch.uint8)
        self._handles = _submit(self._flat, root_rank, name)

    def finish(self) -> None:
        for handle in self._handles:
            synchronize(handle)
        if self._packed and runtime.rank() != self._root:
            for tensor, part in zip(self._tensors, self._parts(self._flat), strict=True):
                tensor.detach().copy_(part)

    def _pack(self) -> torch.Tensor:
        nbytes = sum(_aligned(tensor.nbytes) for tensor in self._tensors)
        if runtime.rank() != self._root:
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        flat = torch.zeros(nbytes, dtype=torch.uint8, device="cpu")
        for tensor, part in zip(self._tensors, self._parts(flat), strict=True):
            part.copy_(tensor.detach())
        return flat

    def _parts(self, flat: torch.Tensor) -> Iterator[torch.Tensor]:
        """For each tensor its part of ``flat``, as a view of its shape and dtype."""
        offset = 0
        for tensor in self._tensors:
            yield flat[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            offset += _aligned(tensor.nbytes)


def _lies_as_it_is(tensor: torch.Tensor) -> bool:
    """Whether the content can be sent from where it lies."""
    return tensor.is_contiguous() and tensor.device.type == "cpu" and not (tensor.is_conj() or tensor.is_neg())


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_NBYTES) * ALIGNMENT_NBYTES
