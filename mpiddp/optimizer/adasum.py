"""Adasum of an optimizer's steps: each rank steps by its own gradients, and the differences are combined.

For plain SGD that is the adaptive sum of the gradients; with momentum or adaptive learning rates it is what the
method's authors recommend: the optimizer sees local gradients, and what is combined is what it made of them.

With a GradScaler, gradients that overflow on one rank only must skip the step on all of them, and lower the scale of
all. So a step begins with an all-reduce of 4 bytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.amp.grad_scaler import OptState

from ..collectives import ReduceOp, adasum, doubling
from ..engine import Channel, Engine, Lane
from ..engine.device import How, launch
from .wrapped import Wrapped, become

__all__ = ["wrap_adasum"]


class _Adasum(Wrapped):
    """Mixed into the optimizer's class."""

    _mpiddp_steps: _Steps

    def step(self, closure: Callable[[], Any] | None = None, *, grad_scaler: Any = None) -> Any:
        """As the wrapped class's, and combined; on no rank where a GradScaler (which passes itself) found infinities
        on any. Collective."""
        found = _unscale(self, grad_scaler) if grad_scaler is not None else []
        self._opt_called = True  # what a scheduler looks for
        if self._mpiddp_steps.is_skipped(found):
            return None
        return super().step(closure)  # type: ignore[misc]

    def synchronize(self) -> None:
        """Nothing to do: it is the step that is combined, after it was made."""

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Accepted as in other optimizers, and without effect: there is nothing to skip."""
        yield

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Gradients accumulate over as many backwards as come before ``step()``; the number is not needed."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the wrapped class's; to be called on every rank."""
        super().add_param_group(param_group)  # type: ignore[misc]
        self._mpiddp_steps.params += self.param_groups[-1]["params"]  # type: ignore[attr-defined]


class _Steps:
    """Remembers the parameters before a step, and combines what it changed."""

    def __init__(self, params: Sequence[torch.Tensor], engine: Engine, lane: Lane, compression: Any) -> None:
        self.params = list(params)
        self._engine, self._lane, self._compression = engine, lane, compression
        self._before: list[torch.Tensor] = []

    @torch.no_grad()
    def is_skipped(self, found: Sequence[torch.Tensor]) -> bool:
        """Whether something on some rank is not finite, which ``found``, a flag a device, say; then all of them do."""
        self._lane.begin_cycle()
        flag = torch.tensor([any(each.item() for each in found)], dtype=torch.float32, device="cpu")
        self._engine.wait(
            self._lane.launch("found_inf", lambda link, tag: doubling.allreduce(link, flag, ReduceOp.MAX, tag))
        )
        if not flag.item():
            return False
        for each in found:
            each.fill_(1)
        self._lane.end_cycle()
        return True

    @torch.no_grad()
    def begin(self) -> None:
        self._before = [param.detach().clone() for param in self.params]

    @torch.no_grad()
    def combine(self) -> None:
        sent = []
        for number, (param, before) in enumerate(zip(self.params, self._before, strict=True)):
            packed, context = self._compression.compress(param - before)
            flat = packed.contiguous().view(-1)
            handle = launch(self._lane, f"step of parameter {number}", flat, adasum.allreduce, How.WHOLE)
            sent.append((flat.view(packed.shape), context, handle))
        for param, before, (packed, context, handle) in zip(self.params, self._before, sent, strict=True):
            self._engine.wait(handle)
            param.copy_(before.add_(self._compression.decompress(packed, context)))
        self._before = []
        self._lane.end_cycle()

    def take_part_without_data(self) -> None:
        """This rank has joined: a step of zeros, which leaves the others' as they are."""
        if self.is_skipped([]):
            return
        self.begin()
        parameters = [param.detach().clone() for param in self.params]
        self.combine()
        with torch.no_grad():
            for param, own in zip(self.params, parameters, strict=True):
                param.copy_(own)


# A scheduler wraps step() to see that it is called; ours says so itself. The class's own calls the hooks for steps.
_Adasum.step.hooked = True  # type: ignore[attr-defined]
_Adasum.step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def _unscale(optimizer: Any, scaler: Any) -> list[torch.Tensor]:
    """Unscale the gradients, unless that was done; the scaler's flags, one a device, which update() will read."""
    state = scaler._per_optimizer_states[id(optimizer)]
    if state["stage"] is OptState.READY:
        scaler.unscale_(optimizer)
    flags: dict[torch.device, torch.Tensor] = state["found_inf_per_device"]
    if not flags:  # no parameter has a gradient here
        scale = scaler._get_scale_async()
        flags[scale.device] = torch.zeros_like(scale)
    return list(flags.values())


def wrap_adasum(
    optimizer: torch.optim.Optimizer,
    params: Sequence[torch.Tensor],
    engine: Engine,
    channel: Channel,
    compression: Any,
) -> torch.optim.Optimizer:
    """Make ``optimizer`` combine its steps by Adasum. Raises ValueError unless the number of ranks is a power of
    two."""
    adasum.check_size(channel.link.size)
    become(optimizer, _Adasum)
    optimizer.__dict__.pop("step", None)  # a scheduler's, over the plain class's
    # A GradScaler hands itself to a step() that asks for it, and says each time that it may not do so for ever.
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    warnings.filterwarnings("ignore", "GradScaler is going to stop passing itself", FutureWarning)
    steps = _Steps(params, engine, channel.lane(), compression)
    steps._lane.mirror = steps.take_part_without_data
    optimizer._mpiddp_steps = steps  # type: ignore[attr-defined]
    optimizer.register_step_pre_hook(lambda *_: steps.begin())
    optimizer.register_step_post_hook(lambda *_: steps.combine())
    return optimizer
