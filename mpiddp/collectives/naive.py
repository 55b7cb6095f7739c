"""All-reduce as its definition says: everybody sends everything to everybody. The oracle of every other algorithm.

Cost: 1 step, (p-1)n elements a rank. Contributions are combined in rank order, so all ranks get the same bits.
"""

from __future__ import annotations

import torch

from ..dtypes import scale_
from ..transport.base import Link, Steps
from .base import ReduceOp

__all__ = ["allreduce"]


def allreduce(link: Link, flat: torch.Tensor, op: ReduceOp, tag: int, scale: float = 1.0) -> Steps:
    """``flat`` becomes ``scale * (x_0 op x_1 op ... op x_{p-1})`` on every rank."""
    return _steps(link, flat, op, tag, scale, flat.new_empty((link.size, flat.numel())))


def _steps(link: Link, flat: torch.Tensor, op: ReduceOp, tag: int, scale: float, contributions: torch.Tensor) -> Steps:
    numel, mine = flat.numel(), link.open(flat)
    peers = [peer for peer in range(link.size) if peer != link.rank]
    contributions[link.rank] = flat
    arrivals = [link.open(contributions[peer]).recv(0, numel, peer, tag) for peer in peers]
    for pending in arrivals + [mine.send(0, numel, peer, tag) for peer in peers]:
        while not pending():
            yield None
    flat.copy_(contributions[0])
    for contribution in contributions[1:]:
        op.combine(flat, contribution, out=flat)
    scale_(flat, scale)
