"""What ``param.grad`` is while each rank holds one part of the averaged gradient only."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from ...errors import MpiddpError

__all__ = ["Holder", "ShardedGradient"]


class Holder(Protocol):
    """Who has the parts."""

    def unscale(self, indices: Sequence[int], found_inf: torch.Tensor, inv_scale: torch.Tensor) -> None:
        """Multiply by ``inv_scale``; ``found_inf`` becomes 1 on all ranks if any part on any rank is not finite."""
        ...

    def zero(self, index: int) -> None:
        """Zero the gradient."""
        ...


class ShardedGradient(torch.Tensor):
    """Stands for a gradient whose parts lie on the ranks: it has a shape, a dtype and a device, and no values.

    A value read here would be that of a part, so reading raises. What goes through: autograd adding another
    backward's gradient (kept in ``added`` until the next exchange), GradScaler's unscaling (:class:`Holder`), zero_().
    """

    added: torch.Tensor | None
    _holder: weakref.ref[Holder]
    _index: int
    _name: str

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def over(param: torch.Tensor, holder: Holder, index: int, name: str) -> ShardedGradient:
        """The gradient of ``param``, the ``index``-th of the holder's, called ``name``."""
        made: ShardedGradient = torch.Tensor._make_wrapper_subclass(
            ShardedGradient, param.size(), strides=param.stride(), dtype=param.dtype, device=param.device
        )
        made.added, made._holder, made._index, made._name = None, weakref.ref(holder), index, name
        return made

    def holder(self) -> Holder:
        """Who has the parts; raises where the optimizer is gone."""
        holder = self._holder()
        if holder is None:
            raise MpiddpError(f"the optimizer that held the gradient of {self._name!r} is gone")
        return holder

    def __repr__(self, *args: Any, **kwargs: Any) -> str:  # type: ignore[override]
        return f"ShardedGradient({self._name!r}, shape={tuple(self.shape)}, {self.dtype}; whole after synchronize())"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        aten = torch.ops.aten
        if func is aten._amp_foreach_non_finite_check_and_unscale_.default:
            return _unscale(*args)
        own = args[0] if args else None
        if isinstance(own, ShardedGradient):
            is_backward = torch._C._current_graph_task_id() != -1
            if func is aten.add_.Tensor and is_backward:
                own.added = _sum(own.added, args[1])
                return own
            if func is aten.add.Tensor and is_backward:  # with create_graph=True
                both = ShardedGradient.over(own, own.holder(), own._index, own._name)
                both.added = _sum(own.added, args[1])
                return both
            if func is aten.zero_.default:
                own.added = None
                own.holder().zero(own._index)
                return own
        raise MpiddpError(_refusal(func, [*args, *(kwargs or {}).values()]))


def _sum(added: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    return more if added is None else added + more


def _unscale(gradients: Sequence[torch.Tensor], found_inf: torch.Tensor, inv_scale: torch.Tensor) -> None:
    whole = [gradient for gradient in gradients if not isinstance(gradient, ShardedGradient)]
    if whole:
        torch._amp_foreach_non_finite_check_and_unscale_(whole, found_inf, inv_scale)
    held: dict[Holder, list[int]] = {}
    for gradient in gradients:
        if isinstance(gradient, ShardedGradient):
            held.setdefault(gradient.holder(), []).append(gradient._index)
    for holder, indices in held.items():
        holder.unscale(indices, found_inf, inv_scale)


def _refusal(func: Any, args: Sequence[Any]) -> str:
    flat = [each for arg in args for each in (arg if isinstance(arg, (list, tuple)) else [arg])]
    name = next(each._name for each in flat if isinstance(each, ShardedGradient))
    return (
        f"the gradient of {name!r} was read ({func}), and with shard=True this rank holds only a part of it after "
        "backward(): call optimizer.synchronize() on every rank first, which gathers whole gradients; to clip, "
        "optimizer.clip_grad_norm_() or max_grad_norm= cost less"
    )
