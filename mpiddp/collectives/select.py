"""Which algorithm for which request. Pure, and the same on every rank, because everything that it looks at is."""

from __future__ import annotations

from functools import partial

import torch

from ..transport.base import Link, Steps
from ..transport.node import Node
from ..transport.session import Meeting
from . import (
    cuda_ipc,
    doubling,
    hierarchical,
    nccl,
    one_shot,
    ordered,
    pairwise,
    ring,
    shared_memory,
    shared_rounds,
    tree,
)
from .base import Bounds, ReduceOp

__all__ = [
    "DOUBLING_NBYTES",
    "allgather",
    "allreduce",
    "allreduce_by",
    "allreduce_met",
    "alltoall",
    "broadcast",
    "is_met_in_one_shot",
    "reduce_scatter",
    "shared_node",
]

#: Up to here the number of steps counts, above it the bytes. Measured at 2 to 4 ranks on one host.
DOUBLING_NBYTES = 32 << 10

SHARED_MEMORY, ORDERED, HIERARCHICAL = "shared_memory", "ordered", "hierarchical"


def allreduce_by(nbytes: int, is_shared: bool, wanted: str = "", is_layered: bool = False) -> str:
    """The name of the algorithm of an all-reduce of so many bytes.

    ``is_shared``: all members share memory; ``is_layered``: they lie on several nodes, of equally many each.
    """
    if is_shared and wanted in ("", SHARED_MEMORY, ORDERED):  # it is ordered, too, with the same bits
        return SHARED_MEMORY
    if wanted in ("ring", "doubling", ORDERED):
        return wanted
    if is_layered and (nbytes > DOUBLING_NBYTES or wanted == HIERARCHICAL):
        return HIERARCHICAL
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
    is_ordered |= link.algorithm == ORDERED
    wanted = ORDERED if is_ordered else link.algorithm
    algorithm = allreduce_by(flat.nbytes, link.node is not None, wanted, link.levels is not None)
    if algorithm == SHARED_MEMORY and link.node is not None:
        if one_shot.is_possible(link.node, flat, scale):
            return one_shot.allreduce(link.node, flat, op, tag, scale)
        return shared_memory.allreduce(link.node, flat, op, tag, scale, is_ordered)
    group = None if is_ordered else nccl.takes(link, flat, op)
    if group is not None:
        return nccl.allreduce(
            link, group, flat, op, tag, scale, lambda link: allreduce(link, flat, op, tag, scale, segment_nbytes)
        )
    if link.gpus is not None:
        return cuda_ipc.allreduce(link, link.gpus, flat, op, tag, scale)
    if algorithm == ORDERED:
        return ordered.allreduce(link, flat, op, tag, scale, segment_nbytes)
    if algorithm == HIERARCHICAL and link.levels is not None:
        return hierarchical.allreduce(link.levels, flat, op, tag, scale, segment_nbytes)
    if algorithm == "doubling":
        return doubling.allreduce(link, flat, op, tag, scale)
    return ring.allreduce(link, flat, op, tag, scale, segment_nbytes)


def allreduce_met(link: Link, meeting: Meeting, flat: torch.Tensor, op: ReduceOp, scale: float) -> Steps:
    """:func:`allreduce` as a meeting of the members, which share memory."""
    assert link.node is not None
    shot = partial(one_shot.allreduce_in, meeting, link.node, flat, op, scale)
    if is_met_in_one_shot(link.node, flat, scale):
        return shot()
    unshown = shot if one_shot.is_possible(link.node, flat, scale, is_meeting=True) else None
    return shared_memory.allreduce_in(meeting, flat, op, scale, link.algorithm == ORDERED, unshown)


def is_met_in_one_shot(node: Node, flat: torch.Tensor, scale: float) -> bool:
    """Whether an all-reduce as a meeting is one shot wherever tensors lie; above it, those that all can map are not."""
    if shared_memory.is_to_be_shown(flat, node.size):
        return False
    return one_shot.is_possible(node, flat, scale, is_meeting=True)


def shared_node(link: Link) -> Node | None:
    """The node's memory, where exchanges are to go through it."""
    return link.node if link.algorithm in ("", SHARED_MEMORY, ORDERED) else None


def reduce_scatter(
    link: Link,
    flat: torch.Tensor,
    bounds: Bounds,
    op: ReduceOp,
    tag: int,
    scale: float = 1.0,
    segment_nbytes: int = ring.SEGMENT_NBYTES,
    is_ordered: bool = False,
) -> Steps:
    """``flat[slice(*bounds[r])]`` becomes the reduction of that chunk on rank r; the others may be overwritten."""
    node = shared_node(link)
    if node is not None:
        return shared_rounds.reduce_scatter(node, flat, bounds, op, tag, scale)
    is_ordered |= link.algorithm == ORDERED
    group = None if is_ordered else nccl.takes(link, flat, op)
    if group is not None:

        def otherwise(link: Link) -> Steps:
            return reduce_scatter(link, flat, bounds, op, tag, scale, segment_nbytes)

        return nccl.reduce_scatter(link, group, flat, bounds, op, tag, scale, otherwise)
    if link.gpus is not None:
        return cuda_ipc.reduce_scatter(link, link.gpus, flat, bounds, op, tag, scale)
    if is_ordered:
        return ordered.reduce_scatter(link, flat, bounds, op, tag, scale, segment_nbytes)
    return ring.reduce_scatter(link, flat, bounds, op, tag, scale, segment_nbytes)


def allgather(
    link: Link, flat: torch.Tensor, bounds: Bounds, tag: int, segment_nbytes: int = ring.SEGMENT_NBYTES
) -> Steps:
    """Every rank's ``flat[slice(*bounds[r])]`` reaches all ranks."""
    node = shared_node(link)
    if node is not None:
        return shared_rounds.allgather(node, flat, bounds, tag)
    group = nccl.takes(link, flat)
    if group is not None:
        return nccl.allgather(
            link, group, flat, bounds, tag, lambda link: allgather(link, flat, bounds, tag, segment_nbytes)
        )
    if link.gpus is not None:
        return cuda_ipc.allgather(link, link.gpus, flat, bounds, tag)
    return ring.allgather(link, flat, bounds, tag, segment_nbytes)


def broadcast(link: Link, flat: torch.Tensor, root: int, tag: int) -> Steps:
    """``flat`` becomes what it is on ``root``, a member's rank, on every rank."""
    node = shared_node(link)
    if node is not None:
        return shared_rounds.broadcast(node, flat, root, tag)
    group = nccl.takes(link, flat)
    if group is not None:
        return nccl.broadcast(link, group, flat, root, tag, lambda link: broadcast(link, flat, root, tag))
    if link.gpus is not None:
        return cuda_ipc.broadcast(link, link.gpus, flat, root, tag)
    return tree.broadcast(link, flat, root, tag)


def alltoall(
    link: Link, source: torch.Tensor, outgoing: Bounds, target: torch.Tensor, incoming: Bounds, tag: int
) -> Steps:
    """``source[slice(*outgoing[r])]`` reaches rank r; what rank r sends here lands in
    ``target[slice(*incoming[r])]``."""
    node = shared_node(link)
    if node is not None:
        return shared_rounds.alltoall(node, source, outgoing, target, incoming, tag)
    return pairwise.alltoall(link, source, outgoing, target, incoming, tag)
