"""Adasum: gradients that point the same way are averaged, orthogonal ones are added.

For two vectors: ``(1 - a.b / (2 a.a)) a + (1 - a.b / (2 b.b)) b``; for more, pairwise up a binary tree, in the order
of the ranks. S. Maleki et al., Scaling Distributed Training with Adaptive Summation, 2020, arXiv 2006.02924.

Cost: log2(p) steps of n elements a rank, p a power of two. Both partners compute the same combination of the same two
vectors in the same order, so that all ranks get the same bits; dot products are summed in float64.
"""

from __future__ import annotations

import torch

from ..dtypes import scale_
from ..transport.base import Link, Steps
from .doubling import transfer

__all__ = ["allreduce", "check_size"]


def check_size(size: int) -> None:
    """ValueError unless ``size`` is a power of two."""
    if size & (size - 1):
        raise ValueError(
            "Adasum combines ranks in pairs, pairs of pairs and so on, so their number must be a power of two, "
            f"not {size}; use Average, or a process set of as many ranks"
        )


def allreduce(link: Link, flat: torch.Tensor, tag: int, scale: float = 1.0) -> Steps:
    """``flat``, one tensor's elements, becomes ``scale`` times the adaptive sum over the ranks."""
    check_size(link.size)
    return _steps(link, flat, tag, scale, torch.empty_like(flat))


def _steps(link: Link, flat: torch.Tensor, tag: int, scale: float, incoming: torch.Tensor) -> Steps:
    data, scratch = link.open(flat), link.open(incoming)
    distance = 1
    while distance < link.size:
        peer = link.rank ^ distance
        yield from transfer(data, scratch, flat.numel(), send_to=peer, recv_from=peer, tag=tag)
        first, second = (flat, incoming) if link.rank < peer else (incoming, flat)
        _combine(first, second, out=flat)
        distance *= 2
    scale_(flat, scale)


def _combine(first: torch.Tensor, second: torch.Tensor, out: torch.Tensor) -> None:
    """The adaptive sum of two vectors; a vector of zeros leaves the other as it is."""
    wide_first, wide_second = first.to(torch.float64), second.to(torch.float64)
    dot = torch.dot(wide_first, wide_second).item()
    norm_first, norm_second = (torch.dot(wide, wide).item() for wide in (wide_first, wide_second))
    weight_first = 1 - dot / (2 * norm_first) if norm_first else 1.0
    weight_second = 1 - dot / (2 * norm_second) if norm_second else 1.0
    out.copy_(wide_first.mul_(weight_first).add_(wide_second, alpha=weight_second))
