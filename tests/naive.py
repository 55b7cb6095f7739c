"""What every operation of a plan must give: the collectives as their definitions say, from all contributions at
once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from mpiddp.collectives.base import ReduceOp
from mpiddp.dtypes import dtype_called, scale_
from mpiddp.engine import Kind, Signature
from tests.programs import Op, Plan

__all__ = ["as_submitted", "contribution", "extent", "reduction", "result", "signature"]


def as_submitted(plan: Plan, op: Op, rank: int) -> Op:
    """The operation as this rank submits it: different on the odd one."""
    members = plan.members(op.team)
    if op.odd is None or len(members) == 1 or members[op.odd % len(members)] != rank:
        return op
    reduces = op.kind in (Kind.ALLREDUCE, Kind.REDUCESCATTER)
    if op.field == "dtype" and op.kind is not Kind.BARRIER:
        return replace(op, dtype="float32" if op.dtype == "float64" else "float64")
    if op.field == "shape" and op.kind is not Kind.BARRIER:
        return replace(op, shape=(*op.shape, 2))
    if op.field == "op" and reduces:
        return replace(op, op=ReduceOp.MAX if op.op is not ReduceOp.MAX else ReduceOp.MIN, is_average=False)
    if op.field == "scale" and reduces and op.op is ReduceOp.SUM:
        return replace(op, is_average=not op.is_average)
    if op.field == "root" and op.kind is Kind.BROADCAST:
        return replace(op, root=op.root + 1)
    return replace(op, kind=Kind.BARRIER if op.kind is not Kind.BARRIER else Kind.ALLTOALL)


def signature(plan: Plan, op: Op, group: tuple[str, int] | tuple[()] = ()) -> Signature:
    """What the ranks must agree on."""
    members = plan.members(op.team)
    if op.kind is Kind.BARRIER:
        return Signature(int(Kind.BARRIER), group=group)
    reduces = op.kind in (Kind.ALLREDUCE, Kind.REDUCESCATTER)
    return Signature(
        int(op.kind),
        op.dtype,
        op.shape[1:] if op.kind in (Kind.ALLGATHER, Kind.ALLTOALL) else op.shape,
        int(op.op) if reduces else 0,
        members[op.root % len(members)] if op.kind is Kind.BROADCAST else 0,
        1.0,
        1 / len(members) if reduces and op.is_average else 1.0,
        group=group,
    )


def extent(plan: Plan, op: Op, rank: int, number: int) -> tuple[int, ...]:
    """What may differ between ranks: an all-gather's rows, the rows that an all-to-all sends to each member."""
    if op.kind is Kind.ALLGATHER:
        return ((op.shape[0] + rank + number) % 4,)
    if op.kind is Kind.ALLTOALL:
        return tuple((number + rank + member) % 3 for member in plan.members(op.team))
    return ()


def contribution(plan: Plan, op: Op, rank: int, number: int) -> torch.Tensor:
    """The tensor of ``rank`` for operation ``number``: small whole numbers, so that all sums are exact."""
    if op.kind is Kind.BARRIER:
        return torch.empty(0, dtype=torch.uint8)
    rows = extent(plan, op, rank, number)
    shape = (sum(rows), *op.shape[1:]) if rows else op.shape
    numel = 1
    for length in shape:
        numel *= length
    values = [(7 * number + 3 * rank + 5 * i * (rank + 1)) % 4 + (op.op == ReduceOp.PRODUCT) for i in range(numel)]
    if op.op == ReduceOp.PRODUCT:
        values = [value % 2 + 1 for value in values]
    if op.dtype == "bool":
        values = [value % 2 for value in values]
    return torch.tensor(values, dtype=dtype_called(op.dtype)).view(shape)


def reduction(op: ReduceOp, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One after the other in rank order; the adaptive sum in pairs, pairs of pairs and so on."""
    if op is ReduceOp.ADASUM:
        level = list(tensors)
        while len(level) > 1:
            level = [_adasum(a, b) for a, b in zip(level[::2], level[1::2], strict=True)]
        return level[0].clone()
    combine = {"SUM": torch.add, "MIN": torch.minimum, "MAX": torch.maximum, "PRODUCT": torch.mul}[op.name]
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total = combine(total, tensor)
    return total


def _adasum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    x, y = a.double(), b.double()
    dot, xx, yy = (x * y).sum().item(), (x * x).sum().item(), (y * y).sum().item()
    left, right = 1 - dot / (2 * xx) if xx else 1.0, 1 - dot / (2 * yy) if yy else 1.0
    return (left * x + right * y).to(a.dtype)


def result(plan: Plan, op: Op, number: int, present: Sequence[int], rank: int) -> Any:
    """What ``rank`` must get when ``present`` take part, and all of them agree."""
    if op.kind is Kind.BARRIER:
        return None
    members = plan.members(op.team)
    tensors = {member: contribution(plan, op, member, number) for member in present}
    if op.kind is Kind.BROADCAST:
        return tensors[members[op.root % len(members)]]
    if op.kind is Kind.ALLGATHER:
        return torch.cat([tensors[member] for member in members])
    if op.kind is Kind.ALLTOALL:
        rows = [extent(plan, op, member, number) for member in members]
        at = members.index(rank)
        pieces = [
            tensors[member][sum(sent[:at]) : sum(sent[: at + 1])] for member, sent in zip(members, rows, strict=True)
        ]
        return torch.cat(pieces), torch.tensor([sent[at] for sent in rows], dtype=torch.int32)
    total = scale_(reduction(op.op, list(tensors.values())), 1 / len(members) if op.is_average else 1.0)
    if op.kind is Kind.ALLREDUCE:
        return total
    base, longer = divmod(op.shape[0], len(members))
    ends = list(itertools.accumulate(base + (index < longer) for index in range(len(members))))
    at = members.index(rank)
    return total[ends[at] - base - (at < longer) : ends[at]]
