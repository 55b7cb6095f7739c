"""Grouped collectives, which run together or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .. import dtypes
from ..compression import Compression
from ..engine import Channel, Handle, Key
from ..errors import ArgumentError
from ..op import Average, Op, resolve
from ..process_set import ProcessSet, global_process_set
from .move import allgather, gather
from .reduce import apart, check_op, reduce_into
from .scatter import check_scatter, scatter, scatter_gradient
from .submit import channel_of, claim, dense, factor, named, synchronize

__all__ = [
    "GroupHandle",
    "grouped_allgather",
    "grouped_allgather_async",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "grouped_reducescatter",
    "grouped_reducescatter_async",
]

_Group = tuple[str, int]


class GroupHandle:
    """The handles of a group; its result is the list of theirs."""

    def __init__(self, handles: Sequence[Handle]) -> None:
        self.handles = list(handles)

    @property
    def done(self) -> bool:
        """Whether every operation of the group is done."""
        return all(handle.done for handle in self.handles)

    def collect(self, synchronize: Callable[[Any], Any]) -> list[Any]:
        """Wait for all of them, so that none is in flight when the first error is raised; return their results."""
        errors: list[Exception] = []
        results = []
        for handle in self.handles:
            try:
                results.append(synchronize(handle))
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return results

    def __repr__(self) -> str:
        return f"GroupHandle({len(self.handles)} operations, {'done' if self.done else 'in flight'})"


def _submit_group(
    tensors: Sequence[torch.Tensor],
    what: str,
    name: str | None,
    process_set: ProcessSet,
    check: Callable[[torch.Tensor], None],
    submit: Callable[[Channel, torch.Tensor, torch.Tensor, Key, _Group], Handle],
) -> GroupHandle:
    """Submit each tensor under the group's name and its place in it, once all are known to be acceptable."""
    channel, tensors = channel_of(process_set), list(tensors)
    own = [dense(tensor, what) for tensor in tensors]
    if not own:
        raise ArgumentError(f"{what} takes at least one tensor")
    for tensor in own:
        dtypes.check(tensor.dtype)
        check(tensor)
    keys: list[Key]
    if name is None:
        channel.unnamed += 1
        number = channel.unnamed
        keys = [number, *((number, place) for place in range(1, len(own)))]
    else:
        name = named(name)
        names = [f"{name}.{place}" for place in range(len(own))]
        for key in names:
            claim(channel, key)
        keys = [*names]
    group = (name or "", len(own))
    return GroupHandle(
        [submit(channel, flat, tensor, key, group) for flat, tensor, key in zip(own, tensors, keys, strict=True)]
    )


def _check_reduction(op: Op | None, average: bool | None, process_set: ProcessSet) -> Callable[[torch.Tensor], None]:
    reduction, _ = resolve(op, average, channel_of(process_set).link.size)
    return lambda tensor: check_op(tensor.dtype, reduction)


def grouped_allreduce_async(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> GroupHandle:
    """:func:`grouped_allreduce` that returns a handle at once."""
    check = _check_reduction(op, average, process_set)
    factors = factor(prescale_factor), factor(postscale_factor)

    def submit(channel: Channel, own: torch.Tensor, _: torch.Tensor, key: Key, group: _Group) -> Handle:
        copy = apart(own)
        return reduce_into(channel, copy, copy, key, op, average, *factors, group=group)

    return _submit_group(tensors, "grouped_allreduce", name, process_set, check, submit)


def grouped_allreduce_async_(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> GroupHandle:
    """:func:`grouped_allreduce_` that returns a handle at once."""
    check = _check_reduction(op, average, process_set)
    factors = factor(prescale_factor), factor(postscale_factor)

    def submit(channel: Channel, own: torch.Tensor, tensor: torch.Tensor, key: Key, group: _Group) -> Handle:
        return reduce_into(channel, own, tensor, key, op, average, *factors, group=group)

    return _submit_group(tensors, "grouped_allreduce_", name, process_set, check, submit)


def grouped_allreduce(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    compression: Any = Compression.none,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[torch.Tensor]:
    """:func:`~mpiddp.allreduce` of several tensors as one: none starts before all are ready everywhere.
    Differentiable."""
    packed = [compression.compress(tensor) for tensor in tensors]
    compressed = [tensor for tensor, _ in packed]
    arguments = (average, name, op, prescale_factor, postscale_factor, process_set)
    if _needs_grad(compressed):
        reduced = _GroupedAllreduce.apply(arguments, *compressed)  # type: ignore[no-untyped-call]
    else:
        reduced = synchronize(grouped_allreduce_async(compressed, *arguments))
    return [compression.decompress(tensor, context) for tensor, (_, context) in zip(reduced, packed, strict=True)]


def grouped_allreduce_(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[torch.Tensor]:
    """:func:`grouped_allreduce` in place."""
    handle = grouped_allreduce_async_(tensors, average, name, op, prescale_factor, postscale_factor, process_set)
    return handle.collect(synchronize)


def grouped_allgather_async(
    tensors: Sequence[torch.Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> GroupHandle:
    """:func:`grouped_allgather` that returns a handle at once."""

    def submit(channel: Channel, own: torch.Tensor, _: torch.Tensor, key: Key, group: _Group) -> Handle:
        return gather(channel, own, key, group=group)

    return _submit_group(tensors, "grouped_allgather", name, process_set, lambda _: None, submit)


def grouped_allgather(
    tensors: Sequence[torch.Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[torch.Tensor]:
    """:func:`~mpiddp.allgather` of several tensors as one. Differentiable."""
    tensors = list(tensors)
    if _needs_grad(tensors):
        return list(_GroupedAllgather.apply(name, process_set, *tensors))  # type: ignore[no-untyped-call]
    return grouped_allgather_async(tensors, name, process_set).collect(synchronize)


def grouped_reducescatter_async(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    op: Op = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> GroupHandle:
    """:func:`grouped_reducescatter` that returns a handle at once."""
    factors = factor(prescale_factor), factor(postscale_factor)

    def submit(channel: Channel, own: torch.Tensor, _: torch.Tensor, key: Key, group: _Group) -> Handle:
        return scatter(channel, own, key, op, *factors, group)

    check = partial(check_scatter, op=op)
    return _submit_group(tensors, "grouped_reducescatter", name, process_set, check, submit)


def grouped_reducescatter(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    compression: Any = Compression.none,
    op: Op = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[torch.Tensor]:
    """:func:`~mpiddp.reducescatter` of several tensors as one. Differentiable, as that is."""
    packed = [compression.compress(tensor) for tensor in tensors]
    compressed = [tensor for tensor, _ in packed]
    arguments = (name, op, process_set, prescale_factor, postscale_factor)
    if _needs_grad(compressed):
        shards = _GroupedReducescatter.apply(arguments, *compressed)  # type: ignore[no-untyped-call]
    else:
        shards = grouped_reducescatter_async(compressed, *arguments).collect(synchronize)
    return [compression.decompress(shard, context) for shard, (_, context) in zip(shards, packed, strict=True)]


def _needs_grad(tensors: Sequence[torch.Tensor]) -> bool:
    return torch.is_grad_enabled() and any(getattr(tensor, "requires_grad", False) for tensor in tensors)


class _GroupedAllreduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arguments: Any, *tensors: torch.Tensor) -> Any:
        ctx.arguments = arguments
        return tuple(grouped_allreduce_async([t.detach() for t in tensors], *arguments).collect(synchronize))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        average, _, op, prescale, postscale, process_set = ctx.arguments
        given = [gradient.contiguous() for gradient in gradients]
        return None, *grouped_allreduce(given, average, None, Compression.none, op, prescale, postscale, process_set)


class _GroupedAllgather(torch.autograd.Function):
    """As a single all-gather's: each rank gets the average of the gradients of its own rows."""

    @staticmethod
    def forward(ctx: Any, name: str | None, process_set: ProcessSet, *tensors: torch.Tensor) -> Any:
        ctx.process_set, ctx.shapes = process_set, [tensor.shape for tensor in tensors]
        return tuple(grouped_allgather_async(tensors, name, process_set).collect(synchronize))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        rows = torch.tensor([[shape[0] if shape else 1 for shape in ctx.shapes]], device="cpu")
        before = allgather(rows, process_set=ctx.process_set)[: channel_of(ctx.process_set).link.rank].sum(0)
        means = grouped_allreduce(gradients, op=Average, process_set=ctx.process_set)
        places = zip(means, before.tolist(), rows[0].tolist(), ctx.shapes, strict=True)
        return None, None, *[mean[begin : begin + count].view(shape) for mean, begin, count, shape in places]


class _GroupedReducescatter(torch.autograd.Function):
    """As a single reduce-scatter's: the gradients gathered, times the number of ranks for a sum."""

    @staticmethod
    def forward(ctx: Any, arguments: Any, *tensors: torch.Tensor) -> Any:
        ctx.op, ctx.process_set = arguments[1], arguments[2]
        return tuple(grouped_reducescatter_async(tensors, *arguments).collect(synchronize))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        given = [scatter_gradient(gradient, ctx.op, ctx.process_set) for gradient in gradients]
        return None, *grouped_allgather(given, process_set=ctx.process_set)
