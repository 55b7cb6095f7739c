"""What this rank holds of the optimizer's state, parameter by parameter: for checkpoints that each rank writes a part
of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..layout import Bucket
from .flat import extents
from .pieces import Piece, State, is_elementwise

__all__ = ["Part", "parts_of"]


@dataclass(frozen=True)
class Part:
    """The elements ``[lo, hi)``, in the order of memory, of what is kept for the parameter ``index``.

    ``elements`` are flat views of them; ``scalars`` is what the parameter has once: only in the part with element 0.
    """

    index: int
    name: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    lo: int
    hi: int
    elements: State
    scalars: State


def parts_of(
    buckets: Sequence[Bucket], owned: Sequence[Sequence[tuple[Piece, State]]], names: Sequence[str]
) -> Iterator[Part]:
    """The parts that lie in ``owned``, this rank's pieces in each bucket with their states. Copies nothing."""
    for bucket, pieces in zip(buckets, owned, strict=True):
        where = extents(bucket)
        for piece, state in pieces:
            shape = piece.weights.shape
            values = {key: value for key, value in state.items() if is_elementwise(key, value, shape)}
            others = {key: value for key, value in state.items() if key not in values}
            for at in piece.places:
                view, start = bucket.views[at], where[at][0]
                lo, hi = max(piece.lo, start), min(piece.hi, start + view.numel())
                if lo >= hi:
                    continue  # the padding behind a parameter
                index = bucket.indices[at]
                yield Part(
                    index, names[index], tuple(view.shape), tuple(view.stride()), lo - start, hi - start,
                    {key: value[lo - piece.lo : hi - piece.lo] for key, value in values.items()},
                    others if lo == start else {},
                )  # fmt: skip
