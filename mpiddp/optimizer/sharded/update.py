"""The update of this rank's pieces, by an optimizer of the wrapped one's class whose parameters they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import torch

from ...collectives.base import chunk_bounds
from ...engine import Engine, Lane
from .flat import ShardLayout, Weights
from .parts import Part, parts_of
from .pieces import BLOCK_NUMEL, Piece, State, cut, split
from .state import make_whole
from .support import fused_class

__all__ = ["Update"]


class Update:
    """The state of the optimizer lies in one of two places: whole, in ``outer.state``, after it was loaded and before
    the first step; or in pieces, here. ``outer`` is the wrapped optimizer, whose groups and options are the user's."""

    def __init__(self, outer: Any, engine: Engine, lane: Lane) -> None:
        self._engine, self._lane = engine, lane
        self._plain: type[torch.optim.Optimizer] = type(outer)
        self._inner = _twin(outer)
        self._pieces: list[list[Piece]] | None = None

    # -- state ---------------------------------------------------------------------------------------------------------

    @property
    def is_cut(self) -> bool:
        """Whether the state is in pieces."""
        return self._pieces is not None

    def forget(self) -> None:
        """Whatever state there is in pieces is out of date."""
        self._pieces = None
        self._inner.state.clear()

    def make_whole(self, layout: ShardLayout, to: int | None) -> dict[int, State]:
        """The whole states of all parameters in ``layout`` by index, on member ``to`` or on all. Collective."""
        return make_whole(self._engine, self._lane, layout.buckets, self._owned(), to)

    def parts(self, layout: ShardLayout, names: Sequence[str]) -> list[Part]:
        """What this rank holds of the state, parameter by parameter."""
        return list(parts_of(layout.buckets, self._owned(), names))

    def _owned(self) -> list[list[tuple[Piece, State]]]:
        state = self._inner.state
        return [[(piece, state.get(piece.weights, {})) for piece in pieces] for pieces in self._pieces or ()]

    def relieve(self, outer: Any, params: Sequence[torch.Tensor], layout: ShardLayout) -> None:
        """Put the whole state back to ``outer``, on every rank: the layout is about to change. Collective."""
        for index, state in self.make_whole(layout, None).items():
            outer.state[params[index]] = state

    def begin(self, outer: Any, params: Sequence[torch.Tensor], layout: ShardLayout, weights: Weights) -> None:
        """Before the buckets are updated: cut what is whole, take over the options of the groups."""
        loaded = {index: outer.state[params[index]] for index in layout.place if outer.state.get(params[index])}
        if loaded or self._pieces is None:
            self._cut(outer, layout, weights, loaded)
            for index in loaded:
                del outer.state[params[index]]
        mine = self._inner.param_groups
        mine.extend({"params": []} for _ in range(len(outer.param_groups) - len(mine)))
        for own, group in zip(mine, outer.param_groups, strict=True):
            own.update({key: value for key, value in group.items() if key != "params"})

    def _cut(self, outer: Any, layout: ShardLayout, weights: Weights, loaded: dict[int, State]) -> None:
        self.forget()
        self._pieces = []
        rank = self._lane.link.rank
        for gradients, flat in zip(layout.buckets, weights.buckets, strict=True):
            own = chunk_bounds(flat.data.numel(), layout.shards)[rank]
            longest = None if any(_fuses(self._plain, g, flat.data) for g in outer.param_groups) else BLOCK_NUMEL
            self._pieces.append([])
            for piece, state in cut(gradients, flat, own, layout.group_of, loaded, longest):
                self._keep(self._pieces[-1], piece, state)

    def _keep(self, pieces: list[Piece], piece: Piece, state: State) -> None:
        pieces.append(piece)
        if state:
            self._inner.state[piece.weights] = state

    def nbytes(self) -> int:
        """What this rank's part of the state takes."""
        values = [value for state in self._inner.state.values() for value in state.values()]
        return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))

    # -- a step --------------------------------------------------------------------------------------------------------

    def bucket(self, number: int, unused: Collection[int], layout: ShardLayout, weights: Weights) -> None:
        """Update this rank's shard of a bucket, but for the parameters (by index) in ``unused``."""
        assert self._pieces is not None
        indices = layout.buckets[number].indices
        if not any(index in unused for index in indices):
            self._step(self._pieces[number], weights.buckets[number].data)
            return
        used = [index for index in indices if index not in unused]
        self._pieces[number] = [
            part
            for piece in self._pieces[number]
            for part in self._split(piece, used, layout.buckets[number], weights.buckets[number])
        ]
        kept = [piece for piece in self._pieces[number] if indices[piece.places.start] not in unused]
        self._step(kept, weights.buckets[number].data)

    def _split(self, piece: Piece, used: Collection[int], gradients: Any, weights: Any) -> list[Piece]:
        if len({gradients.indices[at] in used for at in piece.places}) == 1:
            return [piece]
        parts: list[Piece] = []
        for part, state in split(piece, self._inner.state.pop(piece.weights, {}), used, gradients, weights):
            self._keep(parts, part, state)
        return parts

    def _step(self, pieces: Sequence[Piece], like: torch.Tensor) -> None:
        groups = self._inner.param_groups
        chosen = [group.get("fused") for group in groups]
        for number, group in enumerate(groups):
            group["params"] = [piece.weights for piece in pieces if piece.group == number]
            if _fuses(self._plain, group, like):
                group["fused"] = True
                _fit_steps(self._inner.state, group["params"])
        # The method without torch's hooks, which are called for the user's optimizer.
        step: Any = self._plain.step
        (step.__wrapped__ if getattr(step, "hooked", False) else step)(self._inner)
        for group, fused in zip(groups, chosen, strict=True):
            group["params"], group["fused"] = [], fused

    def end(self, outer: Any) -> None:
        """After all buckets: what the class itself changed in its groups is shown in the user's."""
        for own, group in zip(self._inner.param_groups, outer.param_groups, strict=True):
            group.update({key: own[key] for key in group if key != "params"})


def _twin(outer: Any) -> Any:
    """An optimizer of the same class and options without parameters; made by copying what its constructor made."""
    plain: Any = type(outer)
    inner = plain.__new__(plain)
    inner.__dict__.update({key: value for key, value in vars(outer).items() if key != "step"})
    inner.state = defaultdict(dict)
    inner.param_groups = []
    return inner


def _fuses(plain: type, group: dict[str, Any], like: torch.Tensor) -> bool:
    """Whether to take the fused kernel: the class has one for this dtype, and the user did not choose otherwise."""
    if not fused_class(plain) or any(group.get(key) for key in ("foreach", "capturable", "differentiable")):
        return False
    if group.get("fused") is not None:
        return False
    if plain is torch.optim.SGD and like.is_cpu and like.element_size() == 2:
        return False  # torch 2.13's kernel does nothing there: parameters stay what they are
    plain_rate = not isinstance(group.get("lr"), torch.Tensor)
    return plain_rate and like.is_floating_point() and like.device.type in ("cpu", "cuda")


def _fit_steps(states: Any, weights: Sequence[torch.Tensor]) -> None:
    """Fused kernels want the step count in float32, beside the parameter."""
    for flat in weights:
        step = states[flat].get("step") if flat in states else None
        if isinstance(step, torch.Tensor) and (step.dtype, step.device) != (torch.float32, flat.device):
            states[flat]["step"] = step.to(flat.device, torch.float32)
