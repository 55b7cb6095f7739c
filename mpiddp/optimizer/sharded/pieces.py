"""Pieces: the parts of flat tensors that this rank updates, and the optimizer's state of each. Pure but for copies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..layout import Bucket
from .flat import extents

__all__ = ["BLOCK_NUMEL", "Piece", "State", "cut", "is_elementwise", "split"]

#: What an optimizer keeps for a parameter, or for a piece: tensors of its shape, and others (a step count).
State = dict[str, Any]

#: A class without a fused kernel passes over a piece several times, so pieces are short enough to stay in the cache
#: (0.5 MiB of float32). Measured for AdamW, Adagrad and NAdam on one core: 2^17 and 2^18 alike and 3 times faster
#: than one long piece, 2^14 twice, 2^20 between.
BLOCK_NUMEL = 1 << 17

#: Of no parameter's shape, but that of a parameter without dimensions.
_SCALARS = frozenset({"step", "eta", "mu", "mu_product"})


@dataclass(frozen=True)
class Piece:
    """The elements ``[lo, hi)`` of a bucket's data, of parameters of one group. ``places`` are where in the bucket
    the parameters lie that it has elements of. ``weights.grad`` is the view of the gradients."""

    group: int
    places: range
    lo: int
    hi: int
    weights: torch.Tensor


def is_elementwise(key: str, value: Any, shape: torch.Size) -> bool:
    """Whether a value of the state of a parameter of ``shape`` has an element for each of the parameter's."""
    if not isinstance(value, torch.Tensor) or value.shape != shape:
        return False
    return bool(shape) or key not in _SCALARS


def cut(
    gradients: Bucket,
    weights: Bucket,
    own: tuple[int, int],
    group_of: Callable[[int], int],
    whole: Mapping[int, State],
    most_numel: int | None,
) -> list[tuple[Piece, State]]:
    """The pieces of the range ``own`` of a bucket, none longer than ``most_numel``, with their part of the ``whole``
    states of parameters (by index). Neighbours share a piece if they share a group and all scalars of their states."""
    where = extents(gradients)
    found: list[tuple[Piece, State]] = []
    first = 0
    kinds = [(group_of(index), _scalars(whole.get(index, {}), gradients.views[at].shape))
             for at, index in enumerate(gradients.indices)]  # fmt: skip
    for end in range(1, len(kinds) + 1):
        if end < len(kinds) and kinds[end] == kinds[first]:
            continue
        lo, hi = max(own[0], where[first][0]), min(own[1], where[end - 1][1])
        step = max(1, hi - lo) if most_numel is None else most_numel
        for begin in range(lo, hi, step):
            piece = _piece(kinds[first][0], range(first, end), begin, min(begin + step, hi), where, gradients, weights)
            found.append((piece, _part(piece, whole, gradients, where)))
        first = end
    return found


def split(
    piece: Piece, state: State, used: Collection[int], gradients: Bucket, weights: Bucket
) -> list[tuple[Piece, State]]:
    """``piece`` as pieces of which each has parameters in ``used`` (by index) only, or none of them. Tensors of the
    state become views, scalars are copied: their step counts differ from now on."""
    where = extents(gradients)
    parts: list[tuple[Piece, State]] = []
    first = piece.places.start
    for end in range(first + 1, piece.places.stop + 1):
        ends = end == piece.places.stop
        if not ends and (gradients.indices[end] in used) == (gradients.indices[first] in used):
            continue
        lo, hi = max(piece.lo, where[first][0]), min(piece.hi, where[end - 1][1])
        part = _piece(piece.group, range(first, end), lo, hi, where, gradients, weights)
        span = slice(lo - piece.lo, hi - piece.lo)
        parts.append(
            (part, {k: v[span] if is_elementwise(k, v, piece.weights.shape) else _copy(v) for k, v in state.items()})
        )
        first = end
    return parts


def _piece(
    group: int,
    places: range,
    lo: int,
    hi: int,
    where: Sequence[tuple[int, int]],
    gradients: Bucket,
    weights: Bucket,
) -> Piece:
    inside = [at for at in places if where[at][0] < hi and where[at][1] > lo]
    flat = weights.data[lo:hi]
    flat.grad = gradients.data[lo:hi]
    return Piece(group, range(inside[0], inside[-1] + 1), lo, hi, flat)


def _scalars(state: State, shape: torch.Size) -> list[tuple[str, Any]]:
    """What parameters that share a piece must have in common."""
    return [(key, "elements" if is_elementwise(key, value, shape) else _plain(value)) for key, value in state.items()]


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _part(piece: Piece, whole: Mapping[int, State], gradients: Bucket, where: Sequence[tuple[int, int]]) -> State:
    first = piece.places.start
    state: State = {}
    for key, value in whole.get(gradients.indices[first], {}).items():
        if not is_elementwise(key, value, gradients.views[first].shape):
            state[key] = _copy(value)
            continue
        flat = state[key] = value.new_zeros(piece.hi - piece.lo, device=piece.weights.device)
        for at in piece.places:
            _copy_part(flat, piece.lo, whole[gradients.indices[at]][key], gradients.views[at], where[at][0])
    return state


def _copy_part(flat: torch.Tensor, lo: int, value: torch.Tensor, view: torch.Tensor, start: int) -> None:
    """Copy to ``flat``, which begins at element ``lo``, what it has of ``value``, whose elements begin at ``start``
    and lie as those of ``view`` do."""
    if view.stride() != value.stride():
        value = flat.new_empty(view.numel()).as_strided(view.size(), view.stride()).copy_(value)
    elements = value.as_strided((view.numel(),), (1,), value.storage_offset())
    begin, end = max(lo, start), min(lo + flat.numel(), start + view.numel())
    if begin < end:
        flat[begin - lo : end - lo] = elements[begin - start : end - start]
