"""The optimizer's state, from the ranks' pieces to whole parameters: what a checkpoint wants. Collective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...collectives import select
from ...collectives.base import chunk_bounds
from ...collectives.gather import gather
from ...engine import Engine, Lane
from ...engine.device import launch
from ...transport.base import Link, Steps
from ..agreement import gather_objects
from ..layout import Bucket
from .flat import extents
from .pieces import Piece, State, is_elementwise

__all__ = ["make_whole"]

#: What a rank says of a piece: where it lies, and of each value its dtype, or the value itself.
_Card = tuple[int, int, dict[str, Any]]


def make_whole(
    engine: Engine,
    lane: Lane,
    buckets: Sequence[Bucket],
    owned: Sequence[Sequence[tuple[Piece, State]]],
    to: int | None,
) -> dict[int, State]:
    """The state of each parameter that has one, by its index, on member ``to`` (on all of them if None); {} elsewhere.

    ``owned`` are this rank's pieces in each bucket, with their states. Moves each element once; the receiver needs
    room for the whole, and for one flat tensor of a bucket.
    """
    mine = [[_card(piece, state) for piece, state in pieces] for pieces in owned]
    everyone: list[list[list[_Card]]] = gather_objects(engine, lane, mine)
    is_receiver = to is None or lane.link.rank == to
    whole: dict[int, State] = {}
    for number, bucket in enumerate(buckets):
        cards = sorted((card for cards in everyone for card in cards[number]), key=lambda card: card[0])
        kinds = sorted({(k, v) for *_, said in cards for k, v in said.items() if isinstance(v, torch.dtype)}, key=repr)
        found = {}
        for key, dtype in kinds:
            flat = torch.zeros(bucket.data.numel(), dtype=dtype, device=bucket.data.device)
            for piece, state in owned[number]:
                if key in state and state[key].dtype == dtype:
                    flat[piece.lo : piece.hi] = state[key]
            _collect(engine, lane, f"{key} of bucket {number}", flat, to)
            if is_receiver:
                found[key, dtype] = _views(flat, bucket)
        if is_receiver:
            for at, index in enumerate(bucket.indices):
                said = _covering(cards, *extents(bucket)[at])
                if said:
                    whole[index] = {
                        k: found[k, v][at] if isinstance(v, torch.dtype) else _own(v) for k, v in said.items()
                    }
    return whole


def _card(piece: Piece, state: State) -> _Card:
    return piece.lo, piece.hi, {key: _said(key, value, piece.weights.shape) for key, value in state.items()}


def _said(key: str, value: Any, shape: torch.Size) -> Any:
    if is_elementwise(key, value, shape):
        return value.dtype
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _covering(cards: Sequence[_Card], lo: int, hi: int) -> dict[str, Any]:
    """What is said of the first piece that has elements of ``[lo, hi)``; of a parameter without any, of one beside it,
    whose counts of steps are as good as its own."""
    if lo == hi:
        return next((said for begin, end, said in cards if begin <= lo <= end), {})
    return next((said for begin, end, said in cards if begin < hi and end > lo), {})


def _views(flat: torch.Tensor, bucket: Bucket) -> list[torch.Tensor]:
    """A tensor of its own for each parameter, with the parameter's shape and strides."""
    return [
        flat.as_strided(view.size(), view.stride(), start).clone(memory_format=torch.preserve_format)
        for view, (start, _) in zip(bucket.views, extents(bucket), strict=True)
    ]


def _collect(engine: Engine, lane: Lane, name: str, flat: torch.Tensor, to: int | None) -> None:
    bounds = chunk_bounds(flat.numel(), lane.link.size)

    def start(link: Link, flat: torch.Tensor, tag: int) -> Steps:
        if to is None:
            return select.allgather(link, flat, bounds, tag)
        return gather(link, flat, bounds, to, tag)

    engine.wait(launch(lane, name, flat, start))
