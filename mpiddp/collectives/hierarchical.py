"""Within a node through its memory, between nodes by the ring, so that every node sends each byte once.

The ranks of a node reduce-scatter; then each of them all-reduces its own shard with the ranks that have its local rank
on the other nodes; then the node's ranks gather. Large tensors go in parts: while the network carries one, the memory
works on those before and behind it. All nodes must have the same number of ranks.

Cost, for m nodes of l ranks: 2(m-1)n/m elements sent by each node, 2(m-1) steps; against 2(p-1)n/p by each rank in a
flat ring over p = ml ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..transport.base import Levels, Link, Steps
from ..transport.session import Session
from . import cuda_ipc, nccl, ring, shared_rounds
from .base import Bounds, ReduceOp, cut
from .mapped import aligned_cut

__all__ = ["PART_NBYTES", "allreduce"]

#: What is reduced within the node while the network carries as much: a few segments of each rank's shard.
PART_NBYTES = 8 << 20


def allreduce(
    levels: Levels,
    flat: torch.Tensor,
    op: ReduceOp,
    tag: int,
    scale: float = 1.0,
    segment_nbytes: int = ring.SEGMENT_NBYTES,
    part_nbytes: int = PART_NBYTES,
) -> Steps:
    """``flat`` becomes ``scale * (x_0 op x_1 op ... op x_{p-1})`` on every rank, bit for bit the same."""
    count = max(1, -(-flat.nbytes // part_nbytes))
    parts = [flat[lo:hi] for lo, hi in cut(0, flat.numel(), count)]
    return _Parts(levels, parts, op, tag, scale, segment_nbytes).steps()


class _Parts:
    """Two chains, resumed in turn: what the memory does, in an order that is the same on all ranks, and the network."""

    def __init__(
        self, levels: Levels, parts: Sequence[torch.Tensor], op: ReduceOp, tag: int, scale: float, segment_nbytes: int
    ) -> None:
        self.local, self.cross = levels.local, levels.cross
        self.parts, self.op, self.tag, self.scale, self.segment_nbytes = parts, op, tag, scale, segment_nbytes
        self.bounds = [aligned_cut(part.numel(), self.local.size, part.element_size()) for part in parts]
        self.scattered = self.crossed = 0  # parts of which this rank has its shard, and has it from all nodes

    def steps(self) -> Steps:
        """Both chains to their ends."""
        chains: list[Steps] = [self._memory(), self._network()]
        marks: list[int | None] = [None, None]
        moved = 0
        while chains:
            for chain in list(chains):
                at = chains.index(chain)
                try:
                    mark = next(chain)
                except StopIteration:
                    del chains[at], marks[at]
                    moved += 1
                else:
                    moved += mark != marks[at]
                    marks[at] = mark
            if chains:
                yield moved

    def _memory(self) -> Steps:
        node = self.local.node
        if node is None:
            yield from self._in_order(None)
            return
        with (yield from node.enter(self.tag)) as session:
            yield from self._in_order(session)

    def _in_order(self, session: Session | None) -> Steps:
        last = len(self.parts) - 1
        for number in range(last + 1):
            yield from self._reduce_scatter(session, number)
            self.scattered += 1
            if number:
                yield from self._gather(session, number - 1)
        yield from self._gather(session, last)

    def _reduce_scatter(self, session: Session | None, number: int) -> Steps:
        part, bounds = self.parts[number], self.bounds[number]
        if session is None:
            yield from self._reduce_scatter_apart(self.local, part, bounds)
            return
        if number:
            yield from session.begin_anew()
        yield from shared_rounds.reduce_scatter_in(session, part, bounds, self.op)

    def _reduce_scatter_apart(self, local: Link, part: torch.Tensor, bounds: Bounds) -> Steps:
        """Where the node's ranks share no memory of the host."""
        group = nccl.takes(local, part, self.op)
        if group is not None:

            def otherwise(link: Link) -> Steps:
                return self._reduce_scatter_apart(link, part, bounds)

            return nccl.reduce_scatter(local, group, part, bounds, self.op, self.tag, 1.0, otherwise)
        if local.gpus is not None:
            return cuda_ipc.reduce_scatter(local, local.gpus, part, bounds, self.op, self.tag)
        return ring.reduce_scatter(local, part, bounds, self.op, self.tag, 1.0, self.segment_nbytes)

    def _gather_apart(self, local: Link, part: torch.Tensor, bounds: Bounds) -> Steps:
        group = nccl.takes(local, part)
        if group is not None:
            return nccl.allgather(
                local, group, part, bounds, self.tag, lambda link: self._gather_apart(link, part, bounds)
            )
        if local.gpus is not None:
            return cuda_ipc.allgather(local, local.gpus, part, bounds, self.tag)
        return ring.allgather(local, part, bounds, self.tag, self.segment_nbytes)

    def _gather(self, session: Session | None, number: int) -> Steps:
        while self.crossed <= number:
            yield None
        part, bounds = self.parts[number], self.bounds[number]
        if session is None:
            yield from self._gather_apart(self.local, part, bounds)
            return
        yield from session.begin_anew()
        yield from shared_rounds.allgather_in(session, part, bounds)

    def _network(self) -> Steps:
        for number, part in enumerate(self.parts):
            while self.scattered <= number:
                yield None
            lo, hi = self.bounds[number][self.local.rank]
            yield from ring.allreduce(self.cross, part[lo:hi], self.op, self.tag, self.scale, self.segment_nbytes)
            self.crossed += 1
