"""Broadcast down a binomial tree, and a barrier by dissemination.

Broadcast: ceil(log2 p) levels; the buffer is cut into segments that are passed on as they arrive, so a large buffer
costs little more than the widest node's sends. The barrier: ceil(log2 p) steps of one byte (D. Hensgen, R. Finkel, U.
Manber, Two algorithms for barrier synchronization, IJPP 17(1), 1988).
"""

from __future__ import annotations

import torch

from ..transport.base import Link, Steps
from .base import cut

__all__ = ["SEGMENT_NBYTES", "barrier", "broadcast"]

#: A piece that is passed on while the next one arrives.
SEGMENT_NBYTES = 1 << 20


def broadcast(link: Link, flat: torch.Tensor, root: int, tag: int, segment_nbytes: int = SEGMENT_NBYTES) -> Steps:
    """``flat`` becomes what it is on ``root``, on every rank."""
    size, relative = link.size, (link.rank - root) % link.size
    # The parent is found by clearing the lowest set bit; the children by setting one below it, the farthest first.
    lowest = relative & -relative if relative else 1 << (size - 1).bit_length()
    parent = (relative - lowest + root) % size if relative else None
    distances = [1 << bit for bit in reversed(range(lowest.bit_length() - 1))]
    children = [(relative + distance + root) % size for distance in distances if relative + distance < size]
    segments = max(1, -(-flat.numel() * flat.element_size() // segment_nbytes))
    data = link.open(flat)
    pieces = cut(0, flat.numel(), segments)
    arrivals = [data.recv(lo, hi, parent, tag) for lo, hi in pieces] if parent is not None else []
    departures = []
    for index, (lo, hi) in enumerate(pieces):
        if parent is not None:
            while not arrivals[index]():
                yield None
        departures += [data.send(lo, hi, child, tag) for child in children]
    for pending in departures:
        while not pending():
            yield None


def barrier(link: Link, tag: int) -> Steps:
    """Ends on each rank after it began on every rank."""
    return _barrier(link, tag, torch.zeros(2, dtype=torch.uint8, device="cpu"))


def _barrier(link: Link, tag: int, token: torch.Tensor) -> Steps:
    tokens = link.open(token)
    distance = 1
    while distance < link.size:
        arrival = tokens.recv(1, 2, (link.rank - distance) % link.size, tag)
        departure = tokens.send(0, 1, (link.rank + distance) % link.size, tag)
        for pending in (arrival, departure):
            while not pending():
                yield None
        distance *= 2
