"""Small requests of callers who wait: the content travels with the announcement, the result with the run list.

One round trip to the coordinator does it all. The coordinator combines in the order of the members and scales once, so
that everybody gets the same bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..collectives.base import ReduceOp
from ..collectives.reduction import Reduction
from ..dtypes import dtype_called, scale_
from .request import Kind, Request, Signature

__all__ = ["KINDS", "answer", "content", "receive", "worthwhile"]

KINDS = frozenset({Kind.ALLREDUCE, Kind.BROADCAST, Kind.ALLGATHER, Kind.BARRIER})

#: Up to here one round trip through the coordinator beats a negotiation followed by an exchange (2 ranks on one host).
_NBYTES = 16 << 10

#: What the coordinator may have to read for one request, of all members together.
_TOTAL_NBYTES = 256 << 10


#: What numpy computes as torch does, to the bit, at a third of the cost for a few KiB.
_OF_NUMPY = {name: np.dtype(name) for name in ("float32", "float64", "int32", "int64")}
_FLOATS = ("float32", "float64")
_COMBINE: dict[int, Any] = {
    ReduceOp.SUM: np.add,
    ReduceOp.MIN: np.minimum,
    ReduceOp.MAX: np.maximum,
    ReduceOp.PRODUCT: np.multiply,
}


def worthwhile(nbytes: int, size: int) -> bool:
    """Whether a request of this size, among so many members, should go this way."""
    return nbytes <= _NBYTES and nbytes * size <= _TOTAL_NBYTES


def content(flat: torch.Tensor) -> bytes:
    """The bytes of a contiguous CPU tensor."""
    return ctypes.string_at(flat.data_ptr(), flat.nbytes)


def answer(signature: Signature, contributions: Sequence[bytes], root: int) -> bytes:
    """What every member gets: reduced, the root's, or one after the other."""
    if signature.kind == Kind.BROADCAST:
        return contributions[root]
    if signature.kind == Kind.ALLGATHER:
        return b"".join(contributions)
    if not contributions[0]:
        return b""
    if signature.dtype in _OF_NUMPY and (signature.scale == 1.0 or signature.dtype in _FLOATS):
        return _by_numpy(signature, contributions)
    result = bytearray(contributions[0])
    if len(contributions) > 1:
        dtype, op = dtype_called(signature.dtype), ReduceOp(signature.op)
        contents = (result, *map(bytearray, contributions[1:]))
        parts = [torch.frombuffer(content, dtype=dtype) for content in contents]
        Reduction(op, dtype, signature.scale, len(parts), parts[0].numel())(parts, own=0)
    else:
        scale_(torch.frombuffer(result, dtype=dtype_called(signature.dtype)), signature.scale)
    return bytes(result)


def _by_numpy(signature: Signature, contributions: Sequence[bytes]) -> bytes:
    dtype, combine = _OF_NUMPY[signature.dtype], _COMBINE[signature.op]
    total = np.frombuffer(contributions[0], dtype)
    with np.errstate(all="ignore"):  # infinities are no news to who trains
        for contribution in contributions[1:]:
            total = combine(total, np.frombuffer(contribution, dtype))
        if signature.scale != 1.0:
            total = total * dtype.type(signature.scale)
    return total.tobytes()


def receive(request: Request, data: bytes, extents: Sequence[tuple[int, ...]]) -> None:
    """Finish ``request`` with the answer."""
    flat = request.flat
    if request.signature.kind == Kind.ALLGATHER:
        flat = torch.frombuffer(bytearray(data), dtype=flat.dtype) if data else flat.new_empty(0)
        flat = flat.view(sum(extent[0] for extent in extents), *request.signature.shape)
    elif data:
        ctypes.memmove(flat.data_ptr(), data, len(data))
    request.complete(flat)
