"""The arithmetic of a reduction, block by block while the blocks are in the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..dtypes import SIXTEEN_BIT, scale_
from .base import ReduceOp

_Array = np.ndarray[Any, Any]

__all__ = ["NUMPY_DTYPES", "ArrayReduction", "Reduction", "may_scale_first", "numpy_can", "numpy_reduce"]

#: What numpy computes as torch does, to the bit, at a third of the cost for a few KiB.
NUMPY_DTYPES = {name: np.dtype(name) for name in ("float32", "float64", "int32", "int64")}
_FLOATS = ("float32", "float64")
_NUMPY_COMBINE: dict[int, Any] = {
    ReduceOp.SUM: np.add,
    ReduceOp.MIN: np.minimum,
    ReduceOp.MAX: np.maximum,
    ReduceOp.PRODUCT: np.multiply,
}


def numpy_can(dtype: str, scale: float) -> bool:
    """Whether :func:`numpy_reduce` takes such a reduction."""
    return dtype in NUMPY_DTYPES and (scale == 1.0 or dtype in _FLOATS)


def numpy_reduce(parts: Sequence[_Array], op: int, scale: float, out: _Array | None = None) -> _Array:
    """``scale * (x_0 op x_1 op ...)`` of arrays of one dtype, combined in their order; ``out`` may be none of them."""
    combine, total = _NUMPY_COMBINE[op], parts[0]
    with np.errstate(all="ignore"):  # infinities are no news to who trains
        for part in parts[1:]:
            total = combine(total, part, out=out)
        if scale != 1.0:
            total = np.multiply(total, total.dtype.type(scale), out=out)
    return total


class ArrayReduction:
    """:class:`Reduction` of numpy's arrays, of what :func:`numpy_can` take."""

    __slots__ = ("_combine", "_factor", "_scratch", "dtype")

    def __init__(self, op: ReduceOp, dtype: str, scale: float, size: int, numel: int) -> None:
        self.dtype = NUMPY_DTYPES[dtype]
        self._combine = _NUMPY_COMBINE[op]
        self._factor = self.dtype.type(scale) if scale != 1.0 else None
        self._scratch = np.empty(numel if size > 2 else 0, self.dtype)

    def __call__(self, parts: Sequence[_Array], out: _Array) -> None:
        """See :meth:`Reduction.__call__`."""
        with np.errstate(all="ignore"):
            self.quietly(parts, out)

    def quietly(self, parts: Sequence[_Array], out: _Array) -> None:
        """The same where numpy has been told to keep quiet about infinities, which costs a microsecond."""
        combine, total = self._combine, out
        if len(parts) > 2 and any(part is out for part in parts[2:]):
            total = self._scratch[: len(out)]
        combine(parts[0], parts[1], out=total)
        for part in parts[2:]:
            combine(total, part, out=total)
        if self._factor is not None:
            np.multiply(total, self._factor, out=total)
        if total is not out:
            np.copyto(out, total)


class Reduction:
    """``scale * (x_0 op x_1 op ... op x_{size-1})`` for blocks of at most ``numel`` elements of ``dtype``.

    16-bit floats are combined and scaled in float32 and rounded once; of two bfloat16, whose exponents are those of
    float32, half the sum is taken after that, which is the same but for subnormal numbers.
    """

    __slots__ = ("_is_wide", "_numel", "_scale", "_scratch", "_second", "op")

    def __init__(
        self, op: ReduceOp, dtype: torch.dtype, scale: float, size: int, numel: int, device: torch.device | None = None
    ) -> None:
        self.op, self._scale, self._numel = op, scale, numel
        # Two are added by one operation, which torch does in float32 anyway.
        is_added = size == 2 and (scale == 1.0 or (dtype == torch.bfloat16 and _is_power_of_two(scale)))
        self._is_wide = dtype in SIXTEEN_BIT and not is_added
        self._scratch = torch.empty(numel, dtype=torch.float32 if self._is_wide else dtype, device=device)
        self._second = torch.empty_like(self._scratch) if self._is_wide else self._scratch

    def __call__(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """``out``, which may be one of ``parts``, becomes their reduction, combined in their order."""
        if self._is_wide:
            self._reduce_wide(parts, out)
            return
        combine, total = self.op.combine, out
        if any(part is out for part in parts[2:]):  # it is read after the first sum is written
            total = self._scratch[: out.numel()]
        combine(parts[0], parts[1], total)
        for part in parts[2:]:
            combine(total, part, total)
        if self._scale != 1.0:
            scale_(total, self._scale)
        if total is not out:
            out.copy_(total)

    def _reduce_wide(self, parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        numel = out.numel()
        total, second = self._scratch[:numel], self._second[:numel]
        total.copy_(parts[0])
        for part in parts[1:]:
            second.copy_(part)
            self.op.combine(total, second, total)
        if self._scale != 1.0:
            total.mul_(self._scale)
        out.copy_(total)


def may_scale_first(op: ReduceOp, dtype: torch.dtype, scale: float) -> bool:
    """Whether each contribution may be scaled before the sum: where that rounds nothing, but for subnormal numbers."""
    is_float = dtype in (torch.float32, torch.float64)
    return op is ReduceOp.SUM and is_float and _is_power_of_two(scale) and scale != 1.0


def _is_power_of_two(scale: float) -> bool:
    return scale > 0 and math.frexp(scale)[0] == 0.5
