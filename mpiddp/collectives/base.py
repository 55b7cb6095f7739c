"""What all algorithms share: the reductions, and how a buffer is cut into chunks."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["Bounds", "ReduceOp", "chunk_bounds", "cut"]

#: The chunks of a flat buffer: element ranges, one a rank.
Bounds = Sequence[tuple[int, int]]


class ReduceOp(enum.IntEnum):
    """How two contributions become one. An average is a SUM that is scaled by the owner of each chunk."""

    SUM = 0
    MIN = 1
    MAX = 2
    PRODUCT = 3
    ADASUM = 4

    def combine(self, first: torch.Tensor, second: torch.Tensor, out: torch.Tensor) -> None:
        """``out = first (op) second``, element by element; ``out`` may be either of them. Not for ADASUM."""
        _COMBINE[self](first, second, out=out)

    @property
    def function(self) -> Any:
        """What :meth:`combine` calls: ``function(first, second, out=out)``."""
        return _COMBINE[self]


_COMBINE: dict[ReduceOp, Any] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.MIN: torch.minimum,
    ReduceOp.MAX: torch.maximum,
    ReduceOp.PRODUCT: torch.mul,
}


def cut(lo: int, hi: int, pieces: int) -> list[tuple[int, int]]:
    """``[lo, hi)`` as ``pieces`` ranges whose lengths differ by at most one, the longer ones first."""
    base, longer = divmod(hi - lo, pieces)
    ranges = []
    for index in range(pieces):
        end = lo + base + (index < longer)
        ranges.append((lo, end))
        lo = end
    return ranges


def chunk_bounds(numel: int, size: int) -> list[tuple[int, int]]:
    """The chunk of each rank in a buffer of ``numel`` elements; with fewer elements than ranks some are empty."""
    return cut(0, numel, size)
