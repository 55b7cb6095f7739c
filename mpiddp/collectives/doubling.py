"""Recursive doubling, for small messages: in step k each rank exchanges its partial sum with the rank 2^k away.

Cost: ceil(log2 p) steps when p is a power of two, two more when not; n elements a step. R. Thakur, R. Rabenseifner and
W. Gropp, Optimization of collective communication operations in MPICH, IJHPCA 19(1), 2005.
"""

from __future__ import annotations

import torch

from ..dtypes import scale_
from ..transport.base import Link, Region, Steps
from .base import ReduceOp

__all__ = ["allreduce", "transfer"]


def allreduce(link: Link, flat: torch.Tensor, op: ReduceOp, tag: int, scale: float = 1.0) -> Steps:
    """``flat`` becomes ``scale * (x_0 op x_1 op ... op x_{p-1})`` on every rank, bit for bit the same.

    Both partners combine in the order of their ranks, so that they agree even where the order shows (signed zeros,
    NaNs).
    """
    return _steps(link, flat, op, tag, scale, torch.empty_like(flat))


def _steps(link: Link, flat: torch.Tensor, op: ReduceOp, tag: int, scale: float, incoming: torch.Tensor) -> Steps:
    rank, size, numel = link.rank, link.size, flat.numel()
    data, scratch = link.open(flat), link.open(incoming)
    power = 1 << (size.bit_length() - 1)
    folded = size - power
    # Of the first 2 * folded ranks the even ones hand their contribution to the odd one above and wait for the result.
    if rank < 2 * folded and rank % 2 == 0:
        yield from transfer(data, data, numel, send_to=rank + 1, recv_from=None, tag=tag)
        yield from transfer(data, data, numel, send_to=None, recv_from=rank + 1, tag=tag)
        return
    if rank < 2 * folded:
        yield from transfer(data, scratch, numel, send_to=None, recv_from=rank - 1, tag=tag)
        op.combine(incoming, flat, out=flat)
    virtual = rank // 2 if rank < 2 * folded else rank - folded
    distance = 1
    while distance < power:
        other = virtual ^ distance
        peer = 2 * other + 1 if other < folded else other + folded
        yield from transfer(data, scratch, numel, send_to=peer, recv_from=peer, tag=tag)
        first, second = (flat, incoming) if virtual < other else (incoming, flat)
        op.combine(first, second, out=flat)
        distance *= 2
    scale_(flat, scale)
    if rank < 2 * folded:
        yield from transfer(data, data, numel, send_to=rank - 1, recv_from=None, tag=tag)


def transfer(
    source: Region, target: Region, numel: int, *, send_to: int | None, recv_from: int | None, tag: int
) -> Steps:
    """Receive and send a whole buffer at once, and wait for both."""
    transfers = []
    if recv_from is not None:
        transfers.append(target.recv(0, numel, recv_from, tag))
    if send_to is not None:
        transfers.append(source.send(0, numel, send_to, tag))
    for pending in transfers:
        while not pending():
            yield None
