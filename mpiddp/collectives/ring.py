"""The ring: every rank receives from its left neighbour and sends to its right one, all links busy in both directions.

All-reduce is a reduce-scatter (p-1 steps, after which rank r holds the sum of chunk r) and an all-gather (p-1 steps,
in which the sums travel on). Chunks are cut into segments: a segment is sent on as soon as it has been received and
added, so that the network and the adder work at the same time.

Cost of the all-reduce: 2(p-1) steps, 2n(p-1)/p elements sent by each rank, which no algorithm undercuts.
P. Patarasuk and X. Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, JPDC 69(2), 2009.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..dtypes import scale_
from ..transport.base import Link, Pending, Steps
from . import device_reduction
from .base import Bounds, ReduceOp, chunk_bounds, cut

__all__ = ["AT_ONCE_NBYTES", "SEGMENT_NBYTES", "allgather", "allreduce", "reduce_scatter", "segments_of"]

#: Small enough that a segment that was received is still in the L2 cache when it is added. On one host, 64 KiB to 1 MiB
#: measured alike; over 1 Gbit/s TCP the size made no difference.
SEGMENT_NBYTES = 512 << 10

#: What Open MPI sends over TCP without asking the receiver first: 64 KiB with its header. A chunk of few segments would
#: stand still at each step while they ask: on 4 hosts, 1 Gbit/s and 0.3 ms round trip, an all-reduce of 1 MiB took 27.6
#: ms in segments of 256 KiB and 17.8 in these (gloo 17.5), one of 256 KiB 11.0 and 4.7 (gloo 7.1). Chunks of many large
#: segments ask ahead, for less of the CPU.
AT_ONCE_NBYTES = 60 << 10
_FEW = 2

#: Segments received ahead of the one that is being added.
_WINDOW = 4


def allreduce(
    link: Link,
    flat: torch.Tensor,
    op: ReduceOp,
    tag: int,
    scale: float = 1.0,
    segment_nbytes: int = SEGMENT_NBYTES,
) -> Steps:
    """``flat`` becomes ``scale * (x_0 op x_1 op ... op x_{p-1})`` on every rank, bit for bit the same."""
    bounds = chunk_bounds(flat.numel(), link.size)
    return _Ring.over(link, flat, bounds, tag, segment_nbytes, op, scale).run(0, 2 * (link.size - 1))


def reduce_scatter(
    link: Link,
    flat: torch.Tensor,
    bounds: Bounds,
    op: ReduceOp,
    tag: int,
    scale: float = 1.0,
    segment_nbytes: int = SEGMENT_NBYTES,
) -> Steps:
    """``flat[slice(*bounds[r])]`` becomes the reduction of that chunk on rank r; the other chunks are overwritten."""
    return _Ring.over(link, flat, bounds, tag, segment_nbytes, op, scale).run(0, link.size - 1)


def allgather(link: Link, flat: torch.Tensor, bounds: Bounds, tag: int, segment_nbytes: int = SEGMENT_NBYTES) -> Steps:
    """Every rank's ``flat[slice(*bounds[r])]`` reaches all ranks. p-1 steps; chunks may differ in length."""
    first = link.size - 1
    return _Ring.over(link, flat, bounds, tag, segment_nbytes).run(first, 2 * first)


def segments_of(chunk_nbytes: float, segment_nbytes: int) -> int:
    """The number of segments that a chunk in host memory is cut into."""
    if chunk_nbytes <= _FEW * segment_nbytes:
        segment_nbytes = min(segment_nbytes, AT_ONCE_NBYTES)
    return max(1, -int(-chunk_nbytes // segment_nbytes))


@dataclass(slots=True)
class _Ring:
    """The steps 0..p-2 reduce, the steps p-1..2p-3 gather. In step s rank r sends chunk r-s-1 and receives chunk r-s-2.

    Transfers are numbered: number ``step * segments + k`` moves segment k of the step's chunk. What is sent under
    number i was received under number i - segments.
    """

    link: Link
    flat: torch.Tensor
    chunks: list[list[tuple[int, int]]]
    segments: int
    tag: int
    op: ReduceOp
    scale: float
    scratch: torch.Tensor
    slot_numel: int

    @classmethod
    def over(
        cls,
        link: Link,
        flat: torch.Tensor,
        bounds: Bounds,
        tag: int,
        segment_nbytes: int,
        op: ReduceOp = ReduceOp.SUM,
        scale: float = 1.0,
    ) -> _Ring:
        longest = max(hi - lo for lo, hi in bounds)
        nbytes = longest * flat.element_size()
        segments = segments_of(nbytes, segment_nbytes) if flat.is_cpu else max(1, -(-nbytes // segment_nbytes))
        slot_numel = -(-longest // segments)
        chunks = [cut(lo, hi, segments) for lo, hi in bounds]
        scratch = flat.new_empty(_WINDOW * slot_numel)
        return cls(link, flat, chunks, segments, tag, op, scale, scratch, slot_numel)

    def run(self, first_step: int, last_step: int) -> Steps:
        """The steps ``first_step`` up to but without ``last_step``."""
        if self.link.size == 1:
            scale_(self.flat, self.scale)
            return
        segments, reducing = self.segments, (self.link.size - 1) * self.segments
        begin, end = first_step * segments, last_step * segments
        received = posted = sent = flushed = begin
        arrivals: dict[int, Pending] = {}
        departures: dict[int, Pending] = {}
        data, scratch = self.link.open(self.flat), self.link.open(self.scratch)
        rank, size, tag = self.link.rank, self.link.size, self.tag
        left, right = (rank - 1) % size, (rank + 1) % size
        while received < end or flushed < end:
            while posted < min(end, received + _WINDOW):
                lo, hi = self._piece(posted, -2)
                if posted < reducing:
                    slot = posted % _WINDOW * self.slot_numel
                    arrivals[posted] = scratch.recv(slot, slot + hi - lo, left, tag)
                elif begin == 0 and posted - reducing >= flushed:
                    break  # this piece is received where it was sent from, and that has not left yet
                else:
                    arrivals[posted] = data.recv(lo, hi, left, tag)
                posted += 1
            while sent < min(end, received + segments):
                lo, hi = self._piece(sent, -1)
                departures[sent] = data.send(lo, hi, right, tag)
                sent += 1
            waiting = True
            while received < posted and arrivals[received]():
                del arrivals[received]
                if received < reducing:
                    self._reduce(received, last=received >= reducing - segments)
                received += 1
                waiting = False
                if received + segments > sent:
                    break  # something can be sent on: do so before the next addition
            while flushed < sent and departures[flushed]():
                del departures[flushed]
                flushed += 1
                waiting = False
            if waiting:
                yield received + flushed

    def _piece(self, number: int, shift: int) -> tuple[int, int]:
        step, segment = divmod(number, self.segments)
        return self.chunks[(self.link.rank - step + shift) % self.link.size][segment]

    def _reduce(self, number: int, last: bool) -> None:
        lo, hi = self._piece(number, -2)
        slot = number % _WINDOW * self.slot_numel
        piece = self.flat[lo:hi]
        if not piece.is_cpu:
            device_reduction.combine(
                self.op, piece, self.scratch[slot : slot + hi - lo], piece, self.scale if last else 1.0
            )
            return
        self.op.combine(piece, self.scratch[slot : slot + hi - lo], out=piece)
        if last:
            scale_(piece, self.scale)
