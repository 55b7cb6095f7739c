"""An optimizer that is of its own class, and of a subclass that knows more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["Alone", "Wrapped", "become"]


class Wrapped:
    """The base of what is mixed into an optimizer's class."""

    _mpiddp_plain: type[torch.optim.Optimizer]

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """torch.nn.utils.clip_grad_norm_ of the optimizer's parameters."""
        params = [param for group in self.param_groups for param in group["params"]]  # type: ignore[attr-defined]
        return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite)

    def consolidate_state_dict(self, to: int | None = 0) -> None:
        """Nothing to do, but where the state is sharded."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are plain optimizers of the wrapped class; wrap them anew."""
        return _plain_copy, (self._mpiddp_plain, self.__getstate__())  # type: ignore[attr-defined]


class Alone(Wrapped):
    """Mixed into the optimizer of a rank that is no member of its process set: it works as before, by itself."""

    def synchronize(self) -> None:
        """Nothing to do."""

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Accepted as in other optimizers, and without effect."""
        yield

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Accepted as in other optimizers, and without effect."""


def _plain_copy(plain: type[torch.optim.Optimizer], state: dict[str, Any]) -> torch.optim.Optimizer:
    optimizer = plain.__new__(plain)
    optimizer.__setstate__(state)
    return optimizer


def become(optimizer: torch.optim.Optimizer, mixin: type[Wrapped]) -> None:
    """Give ``optimizer`` a class that derives from ``mixin`` and from its own: schedulers made before keep working."""
    plain = type(optimizer)
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    optimizer.__class__ = type(plain.__name__, (mixin, plain), names)
    optimizer._mpiddp_plain = plain  # type: ignore[attr-defined]
