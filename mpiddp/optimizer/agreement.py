"""Do the ranks optimize the same parameters? Which of them are trained? Asked once, before the first gradient is
exchanged."""

from __future__ import annotations

import hashlib
import pickle
import sys
from collections.abc import Collection, Sequence
from typing import Any

import torch

from ..collectives import ReduceOp, doubling, select
from ..collectives.base import Bounds
from ..dtypes import name_of
from ..engine import Engine, Lane
from ..errors import MismatchError

__all__ = ["agree_on_order", "agree_on_trained", "gather_objects"]

Description = list[tuple[str, tuple[int, ...], str]]


def agree_on_trained(
    engine: Engine, lane: Lane, names: Sequence[str], params: Sequence[torch.Tensor], sparse: Collection[int]
) -> tuple[set[int], set[int]]:
    """The parameters that some rank trains, and those whose gradients are sparse on some rank. Blocking and collective.

    Raises MismatchError on every rank, naming the first parameter that differs, where ranks differ in names, shapes
    or dtypes.
    """
    mine: Description = [
        (name, tuple(param.shape), name_of(param.dtype)) for name, param in zip(names, params, strict=True)
    ]
    described = pickle.dumps(mine)
    digest = hashlib.sha256(repr(mine).encode()).digest()[:16]
    card = torch.frombuffer(bytearray(digest + len(described).to_bytes(8, "little")), dtype=torch.uint8)
    cards = _gather(engine, lane, card, [card.numel()] * lane.link.size)
    if any(other[:16] != digest for other in cards):
        lengths = [int.from_bytes(other[16:], "little") for other in cards]
        payload = torch.frombuffer(bytearray(described), dtype=torch.uint8)
        everyone = [pickle.loads(data) for data in _gather(engine, lane, payload, lengths)]
        raise MismatchError(_difference(everyone))
    masks = torch.zeros(2, len(params), dtype=torch.uint8, device="cpu")
    masks[0] = torch.tensor([param.requires_grad for param in params], device="cpu")
    masks[1, list(sparse)] = 1
    flat = masks.view(-1)
    engine.wait(lane.launch("layout", lambda link, tag: doubling.allreduce(link, flat, ReduceOp.MAX, tag)))
    trained, is_sparse = (set(mask.nonzero().view(-1).tolist()) for mask in masks)
    return trained, is_sparse


def agree_on_order(engine: Engine, lane: Lane, order: Sequence[int]) -> list[int]:
    """Rank 0's order. Blocking and collective."""
    indices = torch.tensor(order if lane.link.rank == 0 else [0] * len(order), dtype=torch.int64, device="cpu")
    engine.wait(lane.launch("order", lambda link, tag: doubling.allreduce(link, indices, ReduceOp.SUM, tag)))
    return [int(index) for index in indices.tolist()]


def gather_objects(engine: Engine, lane: Lane, mine: object) -> list[Any]:
    """Every rank's object, on every rank. Blocking and collective."""
    payload = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8)
    length = torch.tensor([payload.numel()], device="cpu").view(torch.uint8)
    lengths = _gather(engine, lane, length, [length.numel()] * lane.link.size)
    numels = [int.from_bytes(each, sys.byteorder) for each in lengths]
    return [pickle.loads(each) for each in _gather(engine, lane, payload, numels)]


def _gather(engine: Engine, lane: Lane, mine: torch.Tensor, lengths: Sequence[int]) -> list[bytes]:
    bounds: Bounds = [(sum(lengths[:rank]), sum(lengths[: rank + 1])) for rank in range(len(lengths))]
    flat = torch.empty(sum(lengths), dtype=torch.uint8, device="cpu")
    lo, hi = bounds[lane.link.rank]
    flat[lo:hi] = mine
    engine.wait(lane.launch("parameters", lambda link, tag: select.allgather(link, flat, bounds, tag)))
    return [flat[lo:hi].numpy().tobytes() for lo, hi in bounds]


def _difference(everyone: Sequence[Description]) -> str:
    first = everyone[0]
    hint = "build the same model and optimizer on every rank"
    for rank, other in enumerate(everyone):
        for (name, shape, dtype), (other_name, other_shape, other_dtype) in zip(first, other, strict=False):
            if name != other_name:
                return (
                    f"DistributedOptimizer: a parameter is {name!r} on rank 0 and {other_name!r} on rank {rank}: {hint}"
                )
            if (shape, dtype) != (other_shape, other_dtype):
                return (
                    f"DistributedOptimizer: parameter {name!r} is {dtype} of shape {shape} on rank 0 and "
                    f"{other_dtype} of shape {other_shape} on rank {rank}: {hint}"
                )
        if len(first) != len(other):
            longer = max(first, other, key=len)
            extra = longer[min(len(first), len(other))][0]
            return (
                f"DistributedOptimizer: {len(first)} parameters on rank 0 and {len(other)} on rank {rank}; only "
                f"one of them has {extra!r}: {hint}"
            )
    raise AssertionError("the descriptions are equal")
