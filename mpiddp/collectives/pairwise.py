"""All-to-all by pairwise exchange: in step k each rank sends to the rank k above it and receives from the rank k below.

Cost: p-1 steps; every element travels once. All receives are posted at the start.
"""

from __future__ import annotations

import torch

from ..transport.base import Link, Steps
from .base import Bounds

__all__ = ["alltoall"]


def alltoall(
    link: Link, source: torch.Tensor, outgoing: Bounds, target: torch.Tensor, incoming: Bounds, tag: int
) -> Steps:
    """``source[slice(*outgoing[r])]`` reaches rank r; what rank r sends here lands in
    ``target[slice(*incoming[r])]``."""
    rank, size = link.rank, link.size
    (lo, hi), (start, end) = outgoing[rank], incoming[rank]
    target[start:end] = source[lo:hi]
    data, room = link.open(source), link.open(target)
    distances = range(1, size)
    arrivals = [room.recv(*incoming[(rank - d) % size], (rank - d) % size, tag) for d in distances]
    for number, distance in enumerate(distances):
        peer = (rank + distance) % size
        departure = data.send(*outgoing[peer], peer, tag)
        for pending in (departure, arrivals[number]):
            while not pending():
                yield number
