"""An early ``step()`` by a GradScaler: it looks for infinities first, in what has not been exchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import MpiddpError
from .wrapped import Wrapped

if TYPE_CHECKING:
    from .reducer import Reducer

__all__ = ["Scaled", "check_found"]


class Scaled(Wrapped):
    """Mixed into the class of an optimizer whose gradients are exchanged."""

    _mpiddp_reducer: Reducer
    _mpiddp_skip = False
    _mpiddp_early = False  # a GradScaler's step() has had gradients exchanged

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """As the wrapped class's. ``GradScaler.step()`` asks on every rank before it looks at the gradients, and only
        it asks; so what has not been exchanged is exchanged here, and all ranks find the same infinities. Collective.
        """
        self._mpiddp_early = not self._mpiddp_skip and not self._mpiddp_reducer.is_complete
        if self._mpiddp_early:
            self._mpiddp_reducer.finish()
        default = getattr(self._mpiddp_plain, "_step_supports_amp_scaling", False)
        return bool(self.__dict__.get("_step_supports_amp_scaling", default))

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, supports: bool) -> None:
        self.__dict__["_step_supports_amp_scaling"] = supports


def check_found(optimizer: Any) -> None:
    """Raise MpiddpError where a GradScaler has this rank make an early step with what is not finite: it was told to
    look for that by ``unscale_()``, before the exchange."""
    if not optimizer._mpiddp_early:
        return
    optimizer._mpiddp_early = False
    found = getattr(optimizer, "found_inf", None)  # a fused optimizer is told, and does nothing
    if found is not None and found.item():
        return
    grads = (param.grad for param in optimizer._mpiddp_reducer.gradients.params if param.grad is not None)
    if not all(torch.isfinite(grad.coalesce().values() if grad.is_sparse else grad).all() for grad in grads):
        raise MpiddpError(
            "scaler.unscale_(optimizer) looked for infinities in gradients that had not been exchanged, and found none "
            "on this rank; there are some now. Before a step with fewer backwards than backward_passes_per_step, call "
            "optimizer.synchronize() and then scaler.unscale_(optimizer)"
        )
