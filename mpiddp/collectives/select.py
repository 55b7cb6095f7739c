"""Which algorithm for which request. Pure, and the same on every rank, because everything that it looks at is."""

from __future__ import annotations

import torch

from ..transport.base import Link, Steps
from . import doubling, ring
from .base import ReduceOp

__all__ = ["DOUBLING_NBYTES", "allreduce"]

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
