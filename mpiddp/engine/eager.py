"""Small requests of callers who wait: the content travels with the announcement, the result with the run list.

One round trip to the coordinator does it all. The coordinator combines in the order of the members and scales once, so
that everybody gets the same bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from ..collectives.base import ReduceOp
from ..collectives.reduction import NUMPY_DTYPES, Reduction, numpy_can, numpy_reduce
from ..dtypes import dtype_called, scale_
from .request import Kind, Request, Signature

__all__ = ["KINDS", "answer", "content", "receive", "worthwhile"]

KINDS = frozenset({Kind.ALLREDUCE, Kind.BROADCAST, Kind.ALLGATHER, Kind.BARRIER})

#: Up to here one round trip through the coordinator beats a negotiation and an exchange: between nodes, for two ranks
#: of a node (32 KiB: 33 us, 42 after a negotiation), and for more of them (64 KiB at 4 ranks: 145 and 290).
_NBYTES, _PAIR_NBYTES, _NODE_NBYTES = 16 << 10, 32 << 10, 64 << 10

#: What the coordinator may have to read for one request, of all members together.
_TOTAL_NBYTES = 256 << 10


def worthwhile(nbytes: int, size: int, is_shared: bool) -> bool:
    """Whether a request of this size, among so many members, which may share memory, should go this way."""
    limit = _NBYTES if not is_shared else _PAIR_NBYTES if size == 2 else _NODE_NBYTES
    return nbytes <= limit and nbytes * size <= _TOTAL_NBYTES


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
    if numpy_can(signature.dtype, signature.scale):
        dtype = NUMPY_DTYPES[signature.dtype]
        arrays = [np.frombuffer(contribution, dtype) for contribution in contributions]
        return numpy_reduce(arrays, signature.op, signature.scale).tobytes()
    result = bytearray(contributions[0])
    if len(contributions) > 1:
        torch_dtype, op = dtype_called(signature.dtype), ReduceOp(signature.op)
        contents = (result, *map(bytearray, contributions[1:]))
        parts = [torch.frombuffer(content, dtype=torch_dtype) for content in contents]
        Reduction(op, torch_dtype, signature.scale, len(parts), parts[0].numel())(parts, out=parts[0])
    else:
        scale_(torch.frombuffer(result, dtype=dtype_called(signature.dtype)), signature.scale)
    return bytes(result)


def receive(request: Request, data: bytes, extents: Sequence[tuple[int, ...]]) -> None:
    """Finish ``request`` with the answer."""
    flat = request.flat
    if request.signature.kind == Kind.ALLGATHER:
        flat = torch.frombuffer(bytearray(data), dtype=flat.dtype) if data else flat.new_empty(0)
        flat = flat.view(sum(extent[0] for extent in extents), *request.signature.shape)
    elif data:
        ctypes.memmove(flat.data_ptr(), data, len(data))
    request.complete(flat)
