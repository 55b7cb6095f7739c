"""All-to-all and reduce-scatter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..compression import Compression
from ..engine import Channel, Handle, Key, Kind
from ..errors import ArgumentError
from ..op import Adasum, Average, Op, Sum, resolve
from ..process_set import ProcessSet, global_process_set
from .move import allgather
from .reduce import apart, check_op
from .submit import channel_of, dense, factor, in_place, resolved, submit, synchronize

__all__ = [
    "alltoall",
    "alltoall_async",
    "check_scatter",
    "reducescatter",
    "reducescatter_async",
    "scatter",
    "scatter_gradient",
]


def _splits(tensor: torch.Tensor, splits: torch.Tensor | Sequence[int] | None, size: int) -> tuple[int, ...]:
    rows = tensor.shape[0]
    if splits is None:
        if rows % size:
            raise ArgumentError(f"alltoall without splits cuts dim 0 into {size} equal parts, but it has {rows} rows")
        return (rows // size,) * size
    if isinstance(splits, torch.Tensor):
        if splits.is_floating_point() or splits.dim() != 1:
            raise ArgumentError(f"splits must be a 1-d integer tensor, not {splits.dim()}-d of {splits.dtype}")
        splits = splits.tolist()
    numbers = tuple(int(number) for number in splits)
    if len(numbers) != size or min(numbers) < 0 or sum(numbers) != rows:
        raise ArgumentError(
            f"splits must be {size} numbers of at least 0, one a member, that sum to the {rows} rows of dim 0; "
            f"they are {list(numbers)}, which sum to {sum(numbers)}"
        )
    return numbers


def alltoall_async(
    tensor: torch.Tensor,
    splits: torch.Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """:func:`alltoall` that returns a handle at once."""
    own, channel = dense(tensor, "alltoall"), channel_of(process_set)
    if own.dim() == 0:
        raise ArgumentError("alltoall takes a tensor with at least one dim, not a scalar")
    extent = _splits(own, splits, channel.link.size)
    device = splits.device if isinstance(splits, torch.Tensor) else torch.device("cpu")

    def deliver(answer: tuple[torch.Tensor, torch.Tensor]) -> Any:
        return answer[0] if splits is None else (answer[0], answer[1].to(device))

    flat = resolved(own).contiguous().view(-1)
    return submit(channel, Kind.ALLTOALL, own, flat, name, deliver=deliver, shape=tuple(own.shape[1:]), extent=extent)


def alltoall(
    tensor: torch.Tensor,
    splits: torch.Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """Send consecutive rows of dim 0 to each rank; get what the ranks sent here, in rank order.

    ``splits[r]`` rows go to member r; without it dim 0 is cut into equal parts. With splits the answer is
    ``(output, received_splits)``. Differentiable.
    """
    if torch.is_grad_enabled() and isinstance(tensor, torch.Tensor) and tensor.requires_grad:
        output, received = _Alltoall.apply(tensor, splits, name, process_set)  # type: ignore[no-untyped-call]
        return output if splits is None else (output, received)
    return synchronize(alltoall_async(tensor, splits, name, process_set))


def check_scatter(tensor: torch.Tensor, op: Op) -> None:
    """Raise where a reduce-scatter does not apply."""
    if tensor.dim() == 0:
        raise ArgumentError("reducescatter takes a tensor with at least one dim, not a scalar")
    if op is Adasum:
        raise ArgumentError("reducescatter does not take Adasum; use allreduce")
    if tensor.dtype is torch.bool:
        raise TypeError("reducescatter does not take bool tensors")
    check_op(tensor.dtype, resolve(op, None, 1)[0])


def scatter(
    channel: Channel,
    tensor: torch.Tensor,
    name: Key | None,
    op: Op,
    prescale: float,
    postscale: float,
    group: tuple[str, int] | tuple[()] = (),
) -> Handle:
    """Submit a reduce-scatter."""
    check_scatter(tensor, op)
    reduction, divisor = resolve(op, None, channel.link.size)
    flat, _ = in_place(apart(tensor))
    return submit(
        channel,
        Kind.REDUCESCATTER,
        tensor,
        flat,
        name,
        deliver=lambda shard: shard,
        op=reduction,
        prescale=factor(prescale),
        scale=factor(postscale) / divisor,
        group=group,
    )


def reducescatter_async(
    tensor: torch.Tensor,
    name: str | None = None,
    op: Op = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle:
    """:func:`reducescatter` that returns a handle at once."""
    own = dense(tensor, "reducescatter")
    return scatter(channel_of(process_set), own, name, op, prescale_factor, postscale_factor)


def reducescatter(
    tensor: torch.Tensor,
    name: str | None = None,
    compression: Any = Compression.none,
    op: Op = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> torch.Tensor:
    """This rank's rows of the reduction over the ranks, along dim 0; the first ranks take one row more if it is uneven.

    Differentiable for Average and Sum, with Horovod's convention: the gradients gathered, times the number of ranks for
    Sum.
    """
    compressed, context = compression.compress(tensor)
    arguments = (name, op, process_set, prescale_factor, postscale_factor)
    if torch.is_grad_enabled() and isinstance(compressed, torch.Tensor) and compressed.requires_grad:
        shard = _Reducescatter.apply(compressed, *arguments)  # type: ignore[no-untyped-call]
    else:
        shard = synchronize(reducescatter_async(compressed, *arguments))
    result: torch.Tensor = compression.decompress(shard, context)
    return result


def scatter_gradient(gradient: torch.Tensor, op: Op, process_set: ProcessSet) -> torch.Tensor:
    """What a rank contributes to the gradient of a reduce-scatter."""
    if op not in (Average, Sum):
        raise NotImplementedError(f"a reduce-scatter with op={op!r} is not differentiable; Average and Sum are")
    return gradient * channel_of(process_set).link.size if op is Sum else gradient


class _Alltoall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, splits: Any, name: str | None, process_set: ProcessSet) -> Any:
        ctx.process_set = process_set
        if splits is None:
            splits = _splits(tensor, None, channel_of(process_set).link.size)
        output, received = alltoall(tensor.detach(), splits, name, process_set)
        ctx.received = received.tolist()
        ctx.mark_non_differentiable(received)
        return output, received

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: Any) -> Any:
        back, _ = alltoall(gradient, ctx.received, process_set=ctx.process_set)
        return back, None, None, None


class _Reducescatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, *arguments: Any) -> Any:
        ctx.op, ctx.process_set = arguments[1], arguments[2]
        return synchronize(reducescatter_async(tensor.detach(), *arguments))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        given = scatter_gradient(gradient, ctx.op, ctx.process_set)
        return allgather(given, process_set=ctx.process_set), *[None] * 5
