"""What is done to the blocks of a flat tensor on the CPU: cut, copied, reduced. By numpy where it gives the bits that
torch gives: its calls cost a third, slicing a tenth, and its sums in place take two thirds of the time in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ..dtypes import name_of
from .base import ReduceOp
from .reduction import ArrayReduction, Reduction, numpy_can

__all__ = ["Blocks", "blocks_of"]

#: A flat tensor, or a piece of one, as its blocks are handled: torch's or numpy's.
_Flat = Any


class Blocks(Protocol):
    """The operations for one exchange. ``first`` is the factor by which :meth:`stage` scales, the rest of the scale is
    left to :meth:`reduce`."""

    first: float

    def flat(self, tensor: torch.Tensor) -> _Flat:
        """A 1-D tensor as the other methods take it; the same memory."""
        ...

    def seen(self, content: np.ndarray[Any, Any]) -> _Flat:
        """The bytes of a peer's, alike."""
        ...

    def split(self, flat: _Flat, numel: int) -> Sequence[_Flat]:
        """All of it in blocks of so many elements, the last one maybe shorter."""
        ...

    def stage(self, block: _Flat, room: _Flat) -> None:
        """``room`` becomes ``first`` times ``block``."""
        ...

    def copy(self, source: _Flat, target: _Flat) -> None:
        """``target`` becomes ``source``."""
        ...

    def reduce(self, parts: Sequence[_Flat], out: _Flat) -> None:
        """``out``, which may be one of ``parts``, becomes their reduction in their order, scaled."""
        ...


def blocks_of(flat: torch.Tensor, op: ReduceOp, scale: float, first: float, size: int, numel: int) -> Blocks:
    """For blocks of at most ``numel`` elements of tensors like ``flat``, of ``size`` members."""
    kind = _Arrays if numpy_can(name_of(flat.dtype), scale) else _Tensors
    return kind(flat.dtype, op, scale, first, size, numel)


class _Arrays:
    __slots__ = ("_factor", "first", "reduce")

    def __init__(self, dtype: torch.dtype, op: ReduceOp, scale: float, first: float, size: int, numel: int) -> None:
        self.first = first
        self.reduce = ArrayReduction(op, name_of(dtype), scale / first, size, numel)
        self._factor = self.reduce.dtype.type(first)

    def flat(self, tensor: torch.Tensor) -> _Flat:
        return tensor.numpy()

    def seen(self, content: np.ndarray[Any, Any]) -> _Flat:
        return content.view(self.reduce.dtype)

    def split(self, flat: _Flat, numel: int) -> Sequence[_Flat]:
        return [flat[at : at + numel] for at in range(0, len(flat), numel)]

    def stage(self, block: _Flat, room: _Flat) -> None:
        if self.first == 1.0:
            np.copyto(room, block)
        else:
            with np.errstate(all="ignore"):
                np.multiply(block, self._factor, out=room)

    def copy(self, source: _Flat, target: _Flat) -> None:
        np.copyto(target, source)


class _Tensors:
    __slots__ = ("_dtype", "first", "reduce")

    def __init__(self, dtype: torch.dtype, op: ReduceOp, scale: float, first: float, size: int, numel: int) -> None:
        self.first = first
        self._dtype = dtype
        self.reduce = Reduction(op, dtype, scale / first, size, numel)

    def flat(self, tensor: torch.Tensor) -> _Flat:
        return tensor

    def seen(self, content: np.ndarray[Any, Any]) -> _Flat:
        return torch.from_numpy(content).view(self._dtype)

    def split(self, flat: _Flat, numel: int) -> Sequence[_Flat]:
        return torch.unsafe_split(flat, numel) if len(flat) else ()

    def stage(self, block: _Flat, room: _Flat) -> None:
        if self.first == 1.0:
            room.copy_(block)
        else:
            torch.mul(block, self.first, out=room)

    def copy(self, source: _Flat, target: _Flat) -> None:
        target.copy_(source)
