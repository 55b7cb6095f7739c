"""All-reduce, in all its forms."""

from __future__ import annotations

from typing import Any

import torch

from .. import runtime
from ..collectives.base import ReduceOp
from ..compression import Compression
from ..engine import Channel, Handle, Key, Kind, Request, follow_at_once, learn
from ..errors import ArgumentError
from ..op import Average, Op, Product, Sum, resolve
from ..process_set import ProcessSet, global_process_set
from .submit import channel_of, dense, factor, in_place, submit, wait_for

__all__ = [
    "all_ranks",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "any_rank",
    "check_op",
    "reduce_into",
]


_NUMBERS, _PLAIN = (float, int), (torch.Tensor, torch.nn.Parameter)


def check_op(dtype: torch.dtype, op: ReduceOp) -> None:
    """TypeError where ``op`` does not apply to ``dtype``."""
    if dtype is torch.bool and op not in (ReduceOp.MIN, ReduceOp.MAX):
        raise TypeError(f"an all-reduce of bool tensors takes Min (all) or Max (any), not {op.name.lower()}")
    if dtype.is_complex and op in (ReduceOp.MIN, ReduceOp.MAX):
        raise TypeError(f"complex numbers have no order, so {op.name.lower()} does not apply to {dtype}")
    if op == ReduceOp.ADASUM and not dtype.is_floating_point:
        raise TypeError(f"Adasum is for floating-point tensors, not {dtype}")


def reduce_into(
    channel: Channel,
    result: torch.Tensor,
    answer: torch.Tensor,
    name: Key | None,
    op: Op | None,
    average: bool | None,
    prescale: float,
    postscale: float,
    *,
    group: tuple[str, int] | tuple[()] = (),
    blocking: bool = False,
) -> Request:
    """Reduce the content of ``result`` in place; hand out ``answer``, the caller's own view of it."""
    reduction, divisor = resolve(op, average, channel.link.size)
    if reduction == ReduceOp.ADASUM and channel.link.algorithm == "ordered":
        raise ArgumentError(
            "Adasum does not give the same bits for every layout of ranks: not with MPIDDP_DETERMINISTIC"
        )
    if not result.dtype.is_floating_point or reduction == ReduceOp.ADASUM:
        check_op(result.dtype, reduction)
    flat, back = in_place(result)
    deliver = None
    if back is not None:

        def deliver(flat: torch.Tensor) -> torch.Tensor:
            back(flat)
            return answer

    return submit(
        channel,
        Kind.ALLREDUCE,
        result,
        flat,
        name,
        deliver=deliver,
        answer=answer,
        op=reduction,
        prescale=factor(prescale),
        scale=factor(postscale) / divisor,
        group=group,
        blocking=blocking,
    )


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy for the result, so that the caller's tensor is left as it is."""
    return tensor.clone(memory_format=torch.contiguous_format)


def allreduce_async(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """:func:`allreduce` that returns a handle at once. The tensor may be changed or freed as soon as this returns."""
    copy = apart(dense(tensor, "allreduce"))
    return reduce_into(channel_of(process_set), copy, copy, name, op, average, prescale_factor, postscale_factor)


def allreduce(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: Any = Compression.none,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """``postscale * op over ranks(prescale * tensor)``, a new tensor of the same shape and dtype, the same bits
    everywhere.

    ``op`` is Average by default. Integers are averaged and scaled in float64 and truncated. ``compression`` is applied
    to what travels. Differentiable for Average, Sum and Adasum. Raises MismatchError on every rank when shapes, dtypes,
    ops or factors differ between ranks; the library stays usable.
    """
    compressed, context = compression.compress(tensor)
    arguments = (average, name, op, prescale_factor, postscale_factor, process_set)
    if torch.is_grad_enabled() and isinstance(compressed, torch.Tensor) and compressed.requires_grad:
        reduced = _Allreduce.apply(compressed, *arguments)  # type: ignore[no-untyped-call]
    else:
        reduced = _allreduce_now(compressed, *arguments)
    result: torch.Tensor = compression.decompress(reduced, context)
    return result


def _allreduce_now(
    tensor: torch.Tensor,
    average: bool | None,
    name: str | None,
    op: Op | None,
    prescale: float,
    postscale: float,
    process_set: ProcessSet,
) -> torch.Tensor:
    copy = apart(dense(tensor, "allreduce"))
    return _reduce_waiting(channel_of(process_set), copy, copy, name, op, average, prescale, postscale)


def allreduce_async_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """:func:`allreduce_` that returns a handle at once. The tensor is not to be touched before it is synchronized."""
    own = dense(tensor, "allreduce_")
    channel = channel_of(process_set)
    return reduce_into(channel, own, tensor, name, op, average, prescale_factor, postscale_factor)


def allreduce_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> torch.Tensor:
    """:func:`allreduce` in place; returns ``tensor``. Not differentiable."""
    own = dense(tensor, "allreduce_")
    channel = channel_of(process_set)
    return _reduce_waiting(channel, own, tensor, name, op, average, prescale_factor, postscale_factor)


def _reduce_waiting(
    channel: Channel,
    result: torch.Tensor,
    answer: torch.Tensor,
    name: str | None,
    op: Op | None,
    average: bool | None,
    prescale: float,
    postscale: float,
) -> torch.Tensor:
    """Reduce ``result`` in place and wait for that; ``answer``.

    Where the caller gives no name and no factor ahead of the sum, and the ranks share memory, the second call of a kind
    goes by a recipe, which is what would happen anyway in a third of the time.
    """
    kind = None
    if (
        name is None
        and average is None
        and prescale == 1.0
        and type(postscale) in _NUMBERS
        and (op is None or type(op) is Op)
        and type(result) in _PLAIN
        and result.is_cpu
        and result.is_contiguous()
        and not (result.is_inference() or result.is_neg())
    ):
        kind = result.dtype, result.shape, op, postscale
        recipe = channel.recipes.get(kind)
        if recipe is not None:
            request = follow_at_once(runtime.current().engine, channel, recipe, result, answer)
            if request is not None:
                wait_for(request)
            return answer
    handle = reduce_into(channel, result, answer, name, op, average, prescale, postscale, blocking=True)
    wait_for(handle)
    if kind is not None and not result.is_complex():  # of which a view may be conjugate
        learn(channel, kind, handle)
    return answer


class _Allreduce(torch.autograd.Function):
    """The gradient of a sum over ranks is the sum over ranks of the gradients, and alike for an average."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, *arguments: Any) -> torch.Tensor:
        ctx.arguments = arguments
        return _allreduce_now(tensor, *arguments)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        average, _, op, prescale, postscale, process_set = ctx.arguments
        if op not in (None, Average, Sum) and op is not Op.ADASUM:
            raise NotImplementedError(
                f"an all-reduce with op={op!r} is not differentiable; {Product!r}, Min and Max are not"
            )
        return allreduce(gradient, average, None, Compression.none, op, prescale, postscale, process_set), *[None] * 6


def any_rank(flag: bool, process_set: ProcessSet = global_process_set) -> bool:
    """Whether ``flag`` is true on any rank: early stopping as soon as one rank wants it."""
    return _agree(flag, Op.MAX, process_set)


def all_ranks(flag: bool, process_set: ProcessSet = global_process_set) -> bool:
    """Whether ``flag`` is true on every rank."""
    return _agree(flag, Op.MIN, process_set)


def _agree(flag: bool, op: Op, process_set: ProcessSet) -> bool:
    return bool(allreduce_(torch.tensor([bool(flag)], device="cpu"), op=op, process_set=process_set).item())
