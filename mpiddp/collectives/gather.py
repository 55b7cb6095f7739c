"""Gather to one rank: the root receives from everybody else directly."""

from __future__ import annotations

import torch

from ..transport.base import Link, Steps
from .base import Bounds, cut

__all__ = ["gather"]

#: MPI before version 4 counts elements in 32-bit integers.
_PIECE_NBYTES = 1 << 28


def gather(link: Link, flat: torch.Tensor, bounds: Bounds, root: int, tag: int) -> Steps:
    """Every rank's ``flat[slice(*bounds[r])]`` reaches ``root``, in place. The root receives n(p-1)/p elements."""
    region = link.open(flat)
    if link.rank == root:
        senders = [rank for rank in range(link.size) if rank != root]
        under_way = [region.recv(lo, hi, peer, tag) for peer in senders for lo, hi in _pieces(flat, *bounds[peer])]
    else:
        under_way = [region.send(lo, hi, root, tag) for lo, hi in _pieces(flat, *bounds[link.rank])]
    while under_way := [pending for pending in under_way if not pending()]:
        yield len(under_way)


def _pieces(flat: torch.Tensor, lo: int, hi: int) -> list[tuple[int, int]]:
    return cut(lo, hi, max(1, -(-(hi - lo) * flat.element_size() // _PIECE_NBYTES)))
