"""Which ready requests share one exchange. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ..collectives.base import ReduceOp
from .request import Kind, Signature

__all__ = ["fuse"]

_FUSIBLE = frozenset({Kind.ALLREDUCE, Kind.BROADCAST})

#: From here a request has an exchange of its own: packing and unpacking it costs more than an exchange does. Measured
#: at 2 ranks, for each of 16 of 512 KiB: 69 us together, 104 by themselves; of 1 MiB: 270 and 170.
_LARGE_NBYTES = 1 << 20


def fuse(signatures: Sequence[Signature], limit_nbytes: int) -> list[list[int]]:
    """Indices of the requests, grouped: small neighbours of one kind, dtype, op, root, scale and device, up to
    ``limit_nbytes``.

    The order is kept, so that a request never overtakes one before it.
    """
    groups: list[list[int]] = []
    total = 0
    last: Signature | None = None
    for index, signature in enumerate(signatures):
        size = signature.nbytes
        may_join = size < _LARGE_NBYTES and total + size <= limit_nbytes
        if may_join and last is not None and last.nbytes < _LARGE_NBYTES and _alike(last, signature):
            groups[-1].append(index)
            total += size
        else:
            groups.append([index])
            total = size
            last = signature
    return groups


def _alike(first: Signature, second: Signature) -> bool:
    if first is second or first == second:
        return first.kind in _FUSIBLE and first.op != ReduceOp.ADASUM
    return (
        first.kind == second.kind
        and first.kind in _FUSIBLE
        and first.op != ReduceOp.ADASUM
        and first._replace(shape=(), group=()) == second._replace(shape=(), group=())
    )
