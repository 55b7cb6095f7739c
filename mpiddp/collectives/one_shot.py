"""For small tensors on one node: every rank writes its content where all can read it, and adds all of them up itself.

One step; pn elements read by each rank. All add in the order of the ranks, and so get the same bits. numpy does the
arithmetic: at these sizes its calls cost a third of torch's.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence

import torch

from ..dtypes import dtype_called, name_of, scale_
from ..transport.areas import AREA_NBYTES, MEETING_AREA_NBYTES
from ..transport.base import Steps
from ..transport.node import Node
from ..transport.session import STAGED, Session
from .base import ReduceOp
from .reduction import NUMPY_DTYPES, numpy_can, numpy_reduce

__all__ = ["allreduce", "allreduce_in", "combination", "is_possible"]

#: What each rank reads of all its peers, at the most: above it, sharing the additions saves more than a step costs.
_READ_NBYTES, _MEETING_READ_NBYTES = 256 << 10, 3 << 19


def is_possible(node: Node, flat: torch.Tensor, scale: float, is_meeting: bool = False) -> bool:
    """Whether this is the way for such a tensor: the same answer on all ranks."""
    room, most = (MEETING_AREA_NBYTES, _MEETING_READ_NBYTES) if is_meeting else (AREA_NBYTES, _READ_NBYTES)
    return (
        node.areas is not None
        and 0 < flat.nbytes <= room
        and flat.nbytes * (node.size - 1) <= most
        and flat.is_cpu
        and numpy_can(name_of(flat.dtype), scale)
    )


def allreduce(node: Node, flat: torch.Tensor, op: ReduceOp, tag: int, scale: float = 1.0) -> Steps:
    """``flat`` becomes ``scale * (x_0 op x_1 op ... op x_{p-1})`` on every rank, bit for bit the same."""
    with (yield from node.enter(tag)) as session:
        yield from allreduce_in(session, node, flat, op, scale)


def allreduce_in(session: Session, node: Node, flat: torch.Tensor, op: ReduceOp, scale: float = 1.0) -> Steps:
    """:func:`allreduce` as a part of an exchange that goes on."""
    assert node.areas is not None
    ctypes.memmove(node.areas.address(node.rank, session.slot), flat.data_ptr(), flat.nbytes)
    session.count(STAGED, 1)
    while not session.have(STAGED, 1):
        yield None
    combination(node, session.slot, flat.shape, name_of(flat.dtype), op, scale)(flat)


def combination(
    node: Node, slot: int, shape: Sequence[int], dtype: str, op: ReduceOp, scale: float
) -> Callable[[torch.Tensor], object]:
    """What turns a contiguous tensor of this shape into the reduction of what all members have staged in this slot."""
    assert node.areas is not None
    nbytes = math.prod(shape) * NUMPY_DTYPES[dtype].itemsize
    if node.size > 2:
        parts = node.areas.views(slot, nbytes, NUMPY_DTYPES[dtype])
        return lambda tensor: numpy_reduce(parts, op, scale, tensor.numpy().reshape(-1))
    combine = op.function
    other = node.areas.piece(1 - node.rank, slot, nbytes, dtype_called(dtype)).view(tuple(shape))
    # In place, which is less to read, and in the order of the ranks, which decides what becomes of two NaNs.
    if node.rank == 0:
        return lambda tensor: scale_(combine(tensor, other, out=tensor), scale)
    return lambda tensor: scale_(combine(other, tensor, out=tensor), scale)
