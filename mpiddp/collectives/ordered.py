"""A reduction that gives the same bits whatever the sizes of buffers, the timing and the layout of ranks over nodes.

*Direct*: every rank sends each peer that peer's chunk; the owner of a chunk adds the contributions in the order of the
ranks, 16-bit floats in float32, scales, rounds once, and sends the result to all. The bits of an element depend on the
contributions and their number alone: with the exchange through shared memory, which adds in the same order, they agree.

Cost of the all-reduce: 2(p-1)n/p elements sent by each rank, as by the ring, but to all peers at once: two steps, in
which every link carries p-1 streams; and scratch memory for ``_WINDOW`` segments from each peer.
"""

from __future__ import annotations

import torch

from ..dtypes import scale_
from ..transport.base import Link, Pending, Steps
from .base import Bounds, ReduceOp, chunk_bounds, cut
from .reduction import Reduction
from .ring import SEGMENT_NBYTES

__all__ = ["allreduce", "reduce_scatter"]

#: Segments received ahead of the one that is being added.
_WINDOW = 3


def allreduce(
    link: Link,
    flat: torch.Tensor,
    op: ReduceOp,
    tag: int,
    scale: float = 1.0,
    segment_nbytes: int = SEGMENT_NBYTES,
) -> Steps:
    """``flat`` becomes ``scale * (x_0 op x_1 op ... op x_{p-1})``, combined in this order, on every rank."""
    bounds = chunk_bounds(flat.numel(), link.size)
    return _run(link, flat, bounds, op, tag, scale, segment_nbytes, is_gathering=True)


def reduce_scatter(
    link: Link,
    flat: torch.Tensor,
    bounds: Bounds,
    op: ReduceOp,
    tag: int,
    scale: float = 1.0,
    segment_nbytes: int = SEGMENT_NBYTES,
) -> Steps:
    """``flat[slice(*bounds[r])]`` becomes the reduction of that chunk on rank r; the other chunks are left alone."""
    return _run(link, flat, bounds, op, tag, scale, segment_nbytes, is_gathering=False)


def _run(
    link: Link,
    flat: torch.Tensor,
    bounds: Bounds,
    op: ReduceOp,
    tag: int,
    scale: float,
    segment_nbytes: int,
    is_gathering: bool,
) -> Steps:
    if link.size == 1:
        scale_(flat, scale)
        return
    yield from _Direct(link, flat, bounds, op, tag, scale, segment_nbytes, is_gathering).steps()


class _Direct:
    """Between two ranks all messages have one tag and so arrive in the order sent, which is the same everywhere: the
    first ``_WINDOW`` pieces; then, for each segment k, result k (if results are gathered) and piece k + ``_WINDOW``.
    """

    def __init__(
        self,
        link: Link,
        flat: torch.Tensor,
        bounds: Bounds,
        op: ReduceOp,
        tag: int,
        scale: float,
        segment_nbytes: int,
        is_gathering: bool,
    ) -> None:
        longest = max(hi - lo for lo, hi in bounds)
        self.segments = max(1, -(-longest * flat.element_size() // segment_nbytes))
        self.chunks = [cut(lo, hi, self.segments) for lo, hi in bounds]
        self.room = -(-longest // self.segments)
        self.link, self.flat, self.tag, self.is_gathering = link, flat, tag, is_gathering
        self.peers = [(link.rank + distance) % link.size for distance in range(1, link.size)]
        self.scratch = flat.new_empty(_WINDOW * link.size * self.room)
        self.reduction = Reduction(op, flat.dtype, scale, link.size, self.room, flat.device)
        self.order = self._order()
        self.piece_at = {k: at for at, (is_result, k) in enumerate(self.order) if not is_result}
        self.reduced = 0
        self.sent = dict.fromkeys(self.peers, 0)  # how much of the order was sent to, and received from, each peer
        self.posted = dict.fromkeys(self.peers, 0)
        self.departures: dict[tuple[int, int], Pending] = {}  # by peer and place in the order
        self.arrivals: dict[tuple[int, int], Pending] = {}
        self.arrived = [0] * self.segments  # pieces of each segment of the own chunk

    def _order(self) -> list[tuple[bool, int]]:
        """What passes from one rank to another: whether it is a result, and of which segment."""
        order = [(False, k) for k in range(min(_WINDOW, self.segments))]
        for k in range(self.segments):
            if self.is_gathering:
                order.append((True, k))
            if k + _WINDOW < self.segments:
                order.append((False, k + _WINDOW))
        return order

    def steps(self) -> Steps:
        """The whole exchange."""
        self.data, self.rooms = self.link.open(self.flat), self.link.open(self.scratch)
        done = 0
        while True:
            for peer in self.peers:
                self._send(peer)
                self._receive(peer)
            moved = self._settle()
            while self.reduced < self.segments and self.arrived[self.reduced] == len(self.peers):
                self._reduce(self.reduced)
                self.reduced += 1
                moved += 1
            done += moved
            if self._is_over():
                return
            if not moved:
                yield done

    def _is_over(self) -> bool:
        ends = len(self.order)
        return (
            not self.arrivals
            and not self.departures
            and all(self.sent[peer] == self.posted[peer] == ends for peer in self.peers)
        )

    def _send(self, peer: int) -> None:
        """A result once it is there; a piece at once, since the receiver's room for it is the receiver's business."""
        while self.sent[peer] < len(self.order):
            at = self.sent[peer]
            is_result, k = self.order[at]
            if is_result and k >= self.reduced:
                return
            lo, hi = self.chunks[self.link.rank if is_result else peer][k]
            self.departures[peer, at] = self.data.send(lo, hi, peer, self.tag)
            self.sent[peer] += 1

    def _receive(self, peer: int) -> None:
        """A piece where there is room for it; a result where what was sent from there has left."""
        while self.posted[peer] < len(self.order):
            at = self.posted[peer]
            is_result, k = self.order[at]
            if is_result:
                if self.sent[peer] <= self.piece_at[k] or (peer, self.piece_at[k]) in self.departures:
                    return
                lo, hi = self.chunks[peer][k]
                self.arrivals[peer, at] = self.data.recv(lo, hi, peer, self.tag)
            else:
                if k >= self.reduced + _WINDOW:
                    return
                lo, hi = self._room(peer, k)
                self.arrivals[peer, at] = self.rooms.recv(lo, hi, peer, self.tag)
            self.posted[peer] += 1

    def _room(self, peer: int, k: int) -> tuple[int, int]:
        lo, hi = self.chunks[self.link.rank][k]
        start = (k % _WINDOW * self.link.size + peer) * self.room
        return start, start + hi - lo

    def _settle(self) -> int:
        """How many transfers have ended."""
        departed = [key for key, pending in self.departures.items() if pending()]
        arrived = [key for key, pending in self.arrivals.items() if pending()]
        for key in departed:
            del self.departures[key]
        for key in arrived:
            del self.arrivals[key]
            is_result, k = self.order[key[1]]
            if not is_result:
                self.arrived[k] += 1
        return len(departed) + len(arrived)

    def _reduce(self, k: int) -> None:
        lo, hi = self.chunks[self.link.rank][k]
        if lo == hi:
            return
        own = self.flat[lo:hi]
        parts = [
            own if member == self.link.rank else self.scratch[slice(*self._room(member, k))]
            for member in range(self.link.size)
        ]
        self.reduction(parts, own)
