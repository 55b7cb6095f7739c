"""Which ready requests share one exchange. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from .request import Kind, Signature

__all__ = ["fuse"]

_FUSIBLE = frozenset({Kind.ALLREDUCE, Kind.BROADCAST})


def fuse(signatures: Sequence[Signature], nbytes: Sequence[int], limit_nbytes: int) -> list[list[int]]:
    """Indices of the requests, grouped: neighbours of one kind, dtype, op, root, scale and device, up to
    ``limit_nbytes``.

    The order is kept, so that a request never overtakes one before it.
    """
    groups: list[list[int]] = []
    total = 0
    for index, (signature, size) in enumerate(zip(signatures, nbytes, strict=True)):
        if groups and _alike(signatures[groups[-1][0]], signature) and total + size <= limit_nbytes:
            groups[-1].append(index)
            total += size
        else:
            groups.append([index])
            total = size
    return groups


def _alike(first: Signature, second: Signature) -> bool:
    return first.kind in _FUSIBLE and first._replace(shape=()) == second._replace(shape=())
