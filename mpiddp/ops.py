"""The collectives, each in its blocking and its asynchronous form, over one submit function.

All take tensors of any shape, contiguous or not, and every dtype that ``dtypes`` lists; a tensor on another device
than the CPU goes by way of host memory. ``name`` lets ranks submit in different orders; unnamed operations are
matched by their order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import dtypes, runtime
from .collectives.base import ReduceOp
from .engine import Handle, Kind, Request
from .engine.request import Signature
from .errors import DuplicateNameError
from .op import Average, Max, Min, Op, Product, Sum, resolve

__all__ = [
    "Average",
    "Handle",
    "Max",
    "Min",
    "Op",
    "Product",
    "Sum",
    "allgather",
    "allgather_async",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "poll",
    "synchronize",
]

#: Names in flight are looked through for finished ones when there are this many.
_NAMES = 4096


class _Names:
    """The names in flight on this rank, and the counter for operations without one. Belongs to one runtime."""

    def __init__(self, owner: runtime.Runtime) -> None:
        self.owner = owner
        self.in_flight: dict[str, Handle] = {}
        self.unnamed = 0

    def key(self, name: str | None) -> str | int:
        if name is None:
            self.unnamed += 1
            return self.unnamed
        earlier = self.in_flight.get(name)
        if earlier is not None and not earlier.done:
            raise DuplicateNameError(
                f"{name!r} is in flight on rank {self.owner.world.rank} already: synchronize its handle first, or "
                "use another name"
            )
        if len(self.in_flight) >= _NAMES:
            self.in_flight = {n: handle for n, handle in self.in_flight.items() if not handle.done}
        return name


_names: _Names | None = None


def _submit(
    kind: Kind,
    tensor: torch.Tensor,
    flat: torch.Tensor,
    name: str | None,
    deliver: Callable[[torch.Tensor], Any],
    *,
    shape: tuple[int, ...] | None = None,
    op: ReduceOp = ReduceOp.SUM,
    scale: float = 1.0,
    root: int = 0,
    extent: tuple[int, ...] = (),
) -> Handle:
    """Hand one collective to the engine. ``flat`` is what travels; ``tensor`` is what the caller gave, for the
    signature."""
    global _names
    here = runtime.current()
    if _names is None or _names.owner is not here:
        _names = _Names(here)
    dtypes.code_of(tensor.dtype)
    signature = Signature(
        int(kind),
        dtypes.name_of(tensor.dtype),
        tuple(tensor.shape) if shape is None else shape,
        int(op),
        root,
        scale,
        tensor.device.type,
    )
    key = _names.key(name)
    request = Request(key, signature, flat, deliver, extent)
    if name is not None:
        _names.in_flight[name] = request.handle
    return here.engine.submit(here.channel, request)


def _tensor(value: object, what: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{what} takes a torch.Tensor, not a {type(value).__name__}; for objects there is broadcast_object"
        )
    if value.layout is not torch.strided:
        raise ValueError(
            f"{what} takes a dense tensor, not one of layout {value.layout}; make it dense with .to_dense()"
        )
    return value.detach()


def _in_place(tensor: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """A flat tensor to work on, and how its content becomes that of ``tensor``: no copy where none is needed."""
    if tensor.is_contiguous():
        return tensor.view(-1), lambda flat: tensor
    flat = tensor.contiguous().view(-1)
    return flat, lambda flat: tensor.copy_(flat.view(tensor.shape))


def _apart(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy for the result, so that the caller's tensor is left as it is."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _average_or(op: Op | None, average: bool | None) -> Op:
    if average is None:
        return Average if op is None else op
    if op is not None:
        raise ValueError("average= and op= were both given; average= is deprecated, use op= alone")
    return Average if average else Sum


def _allreduce(
    tensor: torch.Tensor,
    result: torch.Tensor,
    average: bool | None,
    name: str | None,
    op: Op | None,
    prescale_factor: float,
    postscale_factor: float,
) -> Handle:
    """Reduce the content of ``result`` in place; hand out ``result``."""
    reduction, factor = resolve(_average_or(op, average), runtime.current().world.size)
    if tensor.dtype is torch.bool and reduction not in (ReduceOp.MIN, ReduceOp.MAX):
        raise TypeError(f"an all-reduce of bool tensors takes Min (all) or Max (any), not {reduction.name.lower()}")
    if tensor.dtype.is_complex and reduction in (ReduceOp.MIN, ReduceOp.MAX):
        raise TypeError(f"complex numbers have no order, so {reduction.name.lower()} does not apply to {tensor.dtype}")
    flat, deliver = _in_place(result)
    dtypes.scale_(flat, prescale_factor)
    scale = factor * postscale_factor
    return _submit(Kind.ALLREDUCE, tensor, flat, name, deliver, op=reduction, scale=scale)


def allreduce_async(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle:
    """:func:`allreduce` that returns a handle at once. The tensor may be changed or freed as soon as this returns."""
    dense = _tensor(tensor, "allreduce")
    return _allreduce(dense, _apart(dense), average, name, op, prescale_factor, postscale_factor)


def allreduce(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> torch.Tensor:
    """``postscale * op over ranks(prescale * tensor)``, a new tensor of the same shape and dtype, the same bits on
    every rank.

    ``op`` is Average by default. Integers are averaged and scaled in float64 and truncated. Raises MismatchError on
    every rank when shapes, dtypes, ops or factors differ between ranks; the library stays usable.
    """
    return _result(allreduce_async(tensor, average, name, op, prescale_factor, postscale_factor))


def allreduce_async_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle:
    """:func:`allreduce_` that returns a handle at once. The tensor is not to be touched before it is synchronized."""
    dense = _tensor(tensor, "allreduce_")
    handle = _allreduce(dense, dense, average, name, op, prescale_factor, postscale_factor)
    return _answering(handle, tensor)


def allreduce_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: Op | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> torch.Tensor:
    """:func:`allreduce` in place; returns ``tensor``."""
    return _result(allreduce_async_(tensor, average, name, op, prescale_factor, postscale_factor))


def _broadcast(tensor: torch.Tensor, result: torch.Tensor, root_rank: int, name: str | None) -> Handle:
    size = runtime.current().world.size
    if not 0 <= root_rank < size:
        raise ValueError(f"root_rank={root_rank} is no rank of this world; ranks are 0 to {size - 1}")
    flat, deliver = _in_place(result)
    return _submit(Kind.BROADCAST, tensor, flat, name, deliver, root=root_rank)


def broadcast_async(tensor: torch.Tensor, root_rank: int, name: str | None = None) -> Handle:
    """:func:`broadcast` that returns a handle at once."""
    dense = _tensor(tensor, "broadcast")
    return _broadcast(dense, _apart(dense), root_rank, name)


def broadcast(tensor: torch.Tensor, root_rank: int, name: str | None = None) -> torch.Tensor:
    """A new tensor with the content that ``tensor`` has on ``root_rank``; shape and dtype must be the same
    everywhere."""
    return _result(broadcast_async(tensor, root_rank, name))


def broadcast_async_(tensor: torch.Tensor, root_rank: int, name: str | None = None) -> Handle:
    """:func:`broadcast_` that returns a handle at once."""
    dense = _tensor(tensor, "broadcast_")
    return _answering(_broadcast(dense, dense, root_rank, name), tensor)


def broadcast_(tensor: torch.Tensor, root_rank: int, name: str | None = None) -> torch.Tensor:
    """:func:`broadcast` in place; returns ``tensor``."""
    return _result(broadcast_async_(tensor, root_rank, name))


def allgather_async(tensor: torch.Tensor, name: str | None = None) -> Handle:
    """:func:`allgather` that returns a handle at once. The tensor is not to be changed before it is synchronized."""
    dense = _tensor(tensor, "allgather")
    if dense.dim() == 0:
        dense = dense.view(1)
    return _submit(
        Kind.ALLGATHER,
        dense,
        dense.contiguous().view(-1),
        name,
        lambda gathered: gathered,
        shape=tuple(dense.shape[1:]),
        extent=(dense.shape[0],),
    )


def allgather(tensor: torch.Tensor, name: str | None = None) -> torch.Tensor:
    """The ranks' tensors, one after the other along dim 0, in rank order.

    Dim 0 may differ between ranks (and be 0); the other dims and the dtype must not. A 0-d tensor counts as one row.
    """
    return _result(allgather_async(tensor, name))


def barrier() -> None:
    """Return on each rank after every rank has come here."""
    nothing = torch.empty(0, dtype=torch.uint8)
    synchronize(_submit(Kind.BARRIER, nothing, nothing, None, lambda flat: None))


def _answering(handle: Handle, tensor: torch.Tensor) -> Handle:
    """Make the handle's result the caller's own tensor rather than its detached alias."""
    handle.answer = tensor
    return handle


def _result(handle: Handle) -> torch.Tensor:
    result: torch.Tensor = synchronize(handle)
    return result


def poll(handle: Handle) -> bool:
    """Whether the result is there; pushes what is in flight first."""
    if not handle.done:
        runtime.current().engine.push()
    return handle.done


def synchronize(handle: Handle) -> Any:
    """Wait for an operation; return its result or raise its error."""
    result = handle.result if handle.done and handle.error is None else runtime.current().engine.wait(handle)
    return result if handle.answer is None else handle.answer
