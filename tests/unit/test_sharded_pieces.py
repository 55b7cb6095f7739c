"""Pieces of flat tensors and the optimizer's state in them, in one process that plays each rank in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mpiddp.collectives.base import chunk_bounds
from mpiddp.optimizer.layout import Bucket
from mpiddp.optimizer.sharded.flat import ShardLayout, Weights, extents
from mpiddp.optimizer.sharded.pieces import Piece, State, cut, split
from mpiddp.optimizer.sharded.support import check_shardable

SHAPES = [(3, 4), (5,), (), (0, 2), (40,), (2, 3, 2)]


def parameters() -> list[torch.Tensor]:
    params = [torch.nn.Parameter(torch.full(shape, float(number))) for number, shape in enumerate(SHAPES)]
    params.append(torch.nn.Parameter(torch.arange(12.0).view(4, 3).t()))
    return params


def states(params: Sequence[torch.Tensor], steps: Sequence[int]) -> dict[int, State]:
    """Of each parameter that has made a step; elements are numbered in logical order, over all parameters."""
    return {
        index: {
            "step": torch.tensor(float(steps[index])),
            "exp_avg": torch.arange(param.numel(), dtype=torch.float32).view(param.shape) + 1000 * index,
        }
        for index, param in enumerate(params)
        if steps[index]
    }


def buckets(params: Sequence[torch.Tensor], shards: int, groups: Sequence[int]) -> tuple[Bucket, Bucket]:
    layout = ShardLayout(params, shards, groups.__getitem__)
    layout.renew(range(len(params)), 1 << 20, 1 << 20, None)
    weights = Weights(params, [str(index) for index in range(len(params))])
    weights.renew(layout)
    (gradients,) = layout.buckets
    return gradients, weights.buckets[0]


def pieces_of(
    gradients: Bucket, weights: Bucket, shards: int, groups: Sequence[int], whole: dict[int, State], most: int | None
) -> list[list[tuple[Piece, State]]]:
    return [
        cut(gradients, weights, own, groups.__getitem__, whole, most)
        for own in chunk_bounds(weights.data.numel(), shards)
    ]


def joined(gradients: Bucket, found: Sequence[tuple[Piece, State]], params: Sequence[torch.Tensor]) -> dict[int, Any]:
    """The whole states again: the naive inverse of cutting."""
    flat = torch.full((gradients.data.numel(),), torch.nan)
    for piece, state in found:
        if state:
            flat[piece.lo : piece.hi] = state["exp_avg"]
    whole: dict[int, Any] = {}
    for at, (index, (lo, hi)) in enumerate(zip(gradients.indices, extents(gradients), strict=True)):
        state = next((s for p, s in found if p.lo < hi and p.hi > lo), {})
        view = gradients.views[at]
        if state and view.numel():
            whole[index] = {"step": state["step"], "exp_avg": flat.as_strided(view.size(), view.stride(), lo)}
    return whole


def assert_same(whole: dict[int, Any], other: dict[int, Any], params: Sequence[torch.Tensor]) -> None:
    assert {i for i in whole if params[i].numel()} == set(other)
    for index, state in other.items():
        assert torch.equal(state["step"], whole[index]["step"])
        assert torch.equal(state["exp_avg"], whole[index]["exp_avg"])


@pytest.mark.parametrize("shards", range(1, 9))
@pytest.mark.parametrize("most", [None, 7, 64])
@pytest.mark.parametrize("steps", [[5] * 7, [0] * 7, [5, 5, 3, 3, 0, 5, 5]])
def test_cutting_loses_nothing(shards: int, most: int | None, steps: list[int]) -> None:
    params, groups = parameters(), [0, 1, 0, 1, 1, 0, 1]
    whole = states(params, steps)
    gradients, weights = buckets(params, shards, groups)
    found = [pair for own in pieces_of(gradients, weights, shards, groups, whole, most) for pair in own]
    assert sum(piece.hi - piece.lo for piece, _ in found) == weights.data.numel()
    for piece, state in found:
        assert {groups[gradients.indices[at]] for at in piece.places} == {piece.group}
        assert most is None or piece.hi - piece.lo <= most
        assert not state or state["exp_avg"].shape == piece.weights.shape
        piece.weights.add_(piece.weights.grad)  # the parameters themselves, and gradients
    assert_same(whole, joined(gradients, found, params), params)
    assert all(torch.equal(param, other) for param, other in zip(params, parameters(), strict=True))


def test_few_pieces_where_nothing_divides_them() -> None:
    params, groups = parameters(), [0, 1, 0, 1, 0, 1, 0]
    gradients, weights = buckets(params, 2, groups)
    whole = states(params, [4] * 7)
    found = pieces_of(gradients, weights, 2, groups, whole, None)
    assert [len(own) for own in found] == [1, 2] or [len(own) for own in found] == [2, 1]
    assert [groups[index] for index in gradients.indices] == sorted(groups)


@pytest.mark.parametrize("used", [{0}, {1, 2, 5}, {0, 1, 2, 3, 4, 5, 6}, {6}])
def test_splitting_loses_nothing_and_step_counts_part(used: set[int]) -> None:
    params, groups = parameters(), [0] * 7
    whole = states(params, [4] * 7)
    gradients, weights = buckets(params, 3, groups)
    parts = []
    for own in pieces_of(gradients, weights, 3, groups, whole, None):
        for piece, state in own:
            parts += split(piece, state, used, gradients, weights)
    for piece, state in parts:
        is_used = {gradients.indices[at] in used for at in piece.places}
        assert len(is_used) == 1
        if is_used == {True}:
            state["step"] += 1
    assert sum(piece.hi - piece.lo for piece, _ in parts) == weights.data.numel()
    steps = [5 if index in used else 4 for index in range(7)]
    assert_same(states(params, steps), joined(gradients, parts, params), params)


def test_shards_are_equal_and_aligned() -> None:
    params = parameters()
    for shards in range(1, 9):
        gradients, weights = buckets(params, shards, [0] * 7)
        numel = gradients.data.numel()
        assert numel % (16 * shards) == 0 and weights.data.numel() == numel
        assert gradients.data.data_ptr() == gradients.flat.data_ptr()
        assert all(p.data_ptr() == v.data_ptr() for p, v in zip(params, weights.views, strict=True) if p.numel())


def test_weights_come_back_after_their_data_was_replaced() -> None:
    params = parameters()
    layout = ShardLayout(params, 2, lambda _: 0)
    layout.renew(range(len(params)), 1 << 20, 1 << 20, None)
    weights = Weights(params, [str(index) for index in range(len(params))])
    weights.renew(layout)
    params[0].data = torch.full((3, 4), 7.0)
    weights.adopt()
    assert params[0].data_ptr() == weights.buckets[0].views[0].data_ptr() and params[0].mean() == 7
    params[1].data = torch.zeros(6)
    with pytest.raises(RuntimeError, match=r"'1' was .*\(5,\).* is .*\(6,\)"):
        weights.adopt()


def test_every_optimizer_of_torch_is_known() -> None:
    """A class that a later torch brings is refused until somebody has looked at it, or listed here."""
    from mpiddp.op import Average

    made = 0
    for name in torch.optim.__all__ if hasattr(torch.optim, "__all__") else dir(torch.optim):
        kind = getattr(torch.optim, name)
        if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer) or kind is torch.optim.Optimizer:
            continue
        optimizer = kind([torch.nn.Parameter(torch.zeros(2, 2))], lr=0.1)
        if name in ("Adafactor", "Muon", "LBFGS", "SparseAdam"):
            with pytest.raises(ValueError, match=f"{name} cannot be used with shard=True"):
                check_shardable(optimizer, Average)
        else:
            check_shardable(optimizer, Average)
            made += 1
    assert made >= 11
