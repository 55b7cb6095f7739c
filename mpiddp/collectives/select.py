"""Which algorithm for which request. Pure, and the same on every rank, because everything that it looks at is."""

from __future__ import annotations

import torch

from ..transport.base import Link, Steps
from . import doubling, ring
from .base import Bounds, ReduceOp

__all__ = ["DOUBLING_NBYTES", "allgather", "allreduce", "reduce_scatter"]

#: Up to here the number of steps counts, above it the bytes. Measured at 2 to 4 ranks on one host.
DOUBLING_NBYTES = 32 << 10


def allreduce(
    link: Link,
    flat: torch.Tensor,
    op: ReduceOp,
    tag: int,
    scale: float = 1.0,
    segment_nbytes: int = ring.SEGMENT_NBYTES,
) -> Steps:
    """``flat`` becomes ``scale * (x_0 op ... op x_{p-1})`` on every rank, by the algorithm that suits its size."""
    if flat.numel() * flat.element_size() <= DOUBLING_NBYTES:
        return doubling.allreduce(link, flat, op, tag, scale)
    return ring.allreduce(link, flat, op, tag, scale, segment_nbytes)


def reduce_scatter(
    link: Link,
    flat: torch.Tensor,
    bounds: Bounds,
    op: ReduceOp,
    tag: int,
    scale: float = 1.0,
    segment_nbytes: int = ring.SEGMENT_NBYTES,
) -> Steps:
    """``flat[slice(*bounds[r])]`` becomes ``scale *`` its reduction on rank r; the rest is undefined afterwards."""
    return ring.reduce_scatter(link, flat, bounds, op, tag, scale, segment_nbytes)


def allgather(
    link: Link, flat: torch.Tensor, bounds: Bounds, tag: int, segment_nbytes: int = ring.SEGMENT_NBYTES
) -> Steps:
    """Every rank's ``flat[slice(*bounds[r])]`` reaches all ranks, in place."""
    return ring.allgather(link, flat, bounds, tag, segment_nbytes)
