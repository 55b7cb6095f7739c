"""Which algorithm for which request. Pure, and the same on every rank, because everything that it looks at is."""

from __future__ import annotations

import torch

from ..transport.base import Link, Steps
from . import doubling, one_shot, ordered, ring, shared_memory
from .base import ReduceOp

__all__ = ["DOUBLING_NBYTES", "allreduce", "allreduce_by"]

#: Up to here the number of steps counts, above it the bytes. Measured at 2 to 4 ranks on one host.
DOUBLING_NBYTES = 32 << 10


def allreduce_by(nbytes: int, is_shared: bool, wanted: str = "") -> str:
    """The name of the algorithm of an all-reduce of so many bytes. ``is_shared``: all members share memory."""
    if is_shared and wanted in ("", "shared_memory", "ordered"):  # it is ordered, too, with the same bits
        return "shared_memory"
    if wanted in ("ring", "doubling", "ordered"):
        return wanted
    return "doubling" if nbytes <= DOUBLING_NBYTES else "ring"


def allreduce(
    link: Link,
    flat: torch.Tensor,
    op: ReduceOp,
    tag: int,
    scale: float = 1.0,
    segment_nbytes: int = ring.SEGMENT_NBYTES,
    is_ordered: bool = False,
) -> Steps:
    """``flat`` becomes ``scale * (x_0 op ... op x_{p-1})`` on every rank, by the algorithm that suits its size.

    ``is_ordered``: by one whose bits depend on nothing but the contributions and their number.
    """
    algorithm = allreduce_by(flat.nbytes, link.node is not None, "ordered" if is_ordered else link.algorithm)
    if algorithm == "shared_memory" and link.node is not None:
        if one_shot.is_possible(link.node, flat, scale):
            return one_shot.allreduce(link.node, flat, op, tag, scale)
        return shared_memory.allreduce(link.node, flat, op, tag, scale)
    if algorithm == "ordered":
        return ordered.allreduce(link, flat, op, tag, scale, segment_nbytes)
    if algorithm == "doubling":
        return doubling.allreduce(link, flat, op, tag, scale)
    return ring.allreduce(link, flat, op, tag, scale, segment_nbytes)
