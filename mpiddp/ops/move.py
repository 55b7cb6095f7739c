"""Broadcast and all-gather."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..engine import Channel, Handle, Key, Kind
from ..errors import ArgumentError
from ..op import Average
from ..process_set import ProcessSet, global_process_set
from .reduce import allreduce, apart
from .submit import channel_of, dense, in_place, resolved, submit, wait_for

__all__ = [
    "allgather",
    "allgather_async",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
]


def _broadcast(
    result: torch.Tensor,
    answer: torch.Tensor,
    root_rank: int,
    name: str | None,
    process_set: ProcessSet,
    blocking: bool,
) -> Handle:
    channel = channel_of(process_set)
    if root_rank not in channel.ranks:
        raise ArgumentError(f"root_rank={root_rank} is no member; the ranks here are {_shown(channel.ranks)}")
    root, (flat, deliver) = int(root_rank), in_place(result)
    back = None if deliver is None else lambda content: (deliver(content), answer)[1]
    return submit(
        channel, Kind.BROADCAST, result, flat, name, deliver=back, answer=answer, root=root, blocking=blocking
    )


def _shown(ranks: Sequence[int]) -> str:
    return f"0 to {len(ranks) - 1}" if list(ranks) == list(range(len(ranks))) else str(list(ranks))


def broadcast_async(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle:
    """:func:`broadcast` that returns a handle at once."""
    copy = apart(dense(tensor, "broadcast"))
    return _broadcast(copy, copy, root_rank, name, process_set, False)


def broadcast(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> torch.Tensor:
    """A new tensor with the content that ``tensor`` has on ``root_rank``, a world rank, also in a process set.

    Shape and dtype must be the same everywhere. Differentiable: the root gets the gradients' average, the others zeros.
    """
    if torch.is_grad_enabled() and isinstance(tensor, torch.Tensor) and tensor.requires_grad:
        return _Broadcast.apply(tensor, root_rank, name, process_set)  # type: ignore[no-any-return,no-untyped-call]
    copy = apart(dense(tensor, "broadcast"))
    result: torch.Tensor = wait_for(_broadcast(copy, copy, root_rank, name, process_set, True))
    return result


def broadcast_async_(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle:
    """:func:`broadcast_` that returns a handle at once."""
    return _broadcast(dense(tensor, "broadcast_"), tensor, root_rank, name, process_set, False)


def broadcast_(
    tensor: torch.Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> torch.Tensor:
    """:func:`broadcast` in place; returns ``tensor``. Not differentiable."""
    result: torch.Tensor = wait_for(_broadcast(dense(tensor, "broadcast_"), tensor, root_rank, name, process_set, True))
    return result


def gather(
    channel: Channel,
    tensor: torch.Tensor,
    name: Key | None,
    *,
    group: tuple[str, int] | tuple[()] = (),
    purpose: str = "",
    blocking: bool = False,
) -> Handle:
    """Submit an all-gather."""
    rows = resolved(tensor.view(1) if tensor.dim() == 0 else tensor)
    return submit(
        channel,
        Kind.ALLGATHER,
        rows,
        rows.contiguous().view(-1),
        name,
        deliver=lambda gathered: gathered,
        shape=tuple(rows.shape[1:]),
        extent=(rows.shape[0],),
        group=group,
        purpose=purpose,
        blocking=blocking,
    )


def allgather_async(
    tensor: torch.Tensor, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle:
    """:func:`allgather` that returns a handle at once. The tensor is not to be changed before it is synchronized."""
    return gather(channel_of(process_set), dense(tensor, "allgather"), name)


def allgather(
    tensor: torch.Tensor, name: str | None = None, process_set: ProcessSet = global_process_set
) -> torch.Tensor:
    """The ranks' tensors, one after the other along dim 0, in rank order.

    Dim 0 may differ between ranks (and be 0); the other dims and the dtype must not. A 0-d tensor counts as one row.
    Differentiable: each rank gets the average of the gradients of its own rows.
    """
    if torch.is_grad_enabled() and isinstance(tensor, torch.Tensor) and tensor.requires_grad:
        return _Allgather.apply(tensor, name, process_set)  # type: ignore[no-any-return,no-untyped-call]
    result: torch.Tensor = wait_for(gather(channel_of(process_set), dense(tensor, "allgather"), name, blocking=True))
    return result


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, root_rank: int, name: str | None, process_set: ProcessSet) -> Any:
        ctx.root_rank, ctx.process_set = root_rank, process_set
        return broadcast(tensor.detach(), root_rank, name, process_set)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        channel = channel_of(ctx.process_set)
        mean = allreduce(gradient, op=Average, process_set=ctx.process_set)
        is_root = channel.ranks[channel.link.rank] == ctx.root_rank
        return mean if is_root else torch.zeros_like(mean), None, None, None


class _Allgather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, name: str | None, process_set: ProcessSet) -> Any:
        ctx.shape, ctx.process_set = tensor.shape, process_set
        return allgather(tensor.detach(), name, process_set)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        rows = ctx.shape[0] if ctx.shape else 1
        counts = allgather(torch.tensor([rows], device="cpu"), process_set=ctx.process_set).tolist()
        begin = sum(counts[: channel_of(ctx.process_set).link.rank])
        mean = allreduce(gradient, op=Average, process_set=ctx.process_set)
        return mean[begin : begin + rows].view(ctx.shape), None, None
