"""How the parts of a TorchState are saved, restored and synchronised: models, optimizers, samplers, schedulers."""

from __future__ import annotations

from typing import Any

import torch

from ..functions import allgather_object, broadcast_object, broadcast_optimizer_state, broadcast_parameters
from ..ops import any_rank
from .sampler import ElasticSampler
from .snapshot import snapshot

__all__ = ["Handler", "ModelHandler", "OptimizerHandler", "SamplerHandler", "handler_of"]


class Handler:
    """Anything with ``state_dict()`` and ``load_state_dict()``: a scheduler, a GradScaler, an average of weights."""

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value
        self._saved = snapshot(name, value.state_dict())

    def save(self) -> None:
        """Keep a copy of the state, in host memory."""
        self._saved = snapshot(self.name, self.value.state_dict())

    def restore(self) -> None:
        """Load what was saved last."""
        # A copy, since some classes keep the very objects that they load and write to them later.
        self.value.load_state_dict(snapshot(self.name, self._saved))

    def sync(self) -> None:
        """Load rank 0's state."""
        self.value.load_state_dict(broadcast_object(self.value.state_dict(), 0, f"elastic.{self.name}"))

    def reset(self) -> None:
        """Fit it to a new world."""

    def settle(self, exchanging: bool) -> None:
        """End what a failure has left half done, together with the other ranks; ``exchanging``: on some rank it is."""

    def is_settled(self) -> bool:
        """Whether nothing is half done on this rank."""
        return True


class ModelHandler(Handler):
    """Parameters and buffers."""

    def sync(self) -> None:
        """Take over rank 0's."""
        broadcast_parameters(self.value.state_dict(), 0)


class OptimizerHandler(Handler):
    """Momenta, step counts and hyperparameters."""

    def save(self) -> None:
        """Keep the state; collective where it is sharded, since each rank keeps the whole."""
        if hasattr(self.value, "consolidate_state_dict"):
            self.value.consolidate_state_dict(to=None)
        super().save()

    def sync(self) -> None:
        """Take over rank 0's."""
        broadcast_optimizer_state(self.value, 0)

    def is_settled(self) -> bool:
        """Whether no gradients are being exchanged, which a backward that failed has begun."""
        reducer = getattr(self.value, "_mpiddp_reducer", None)
        return reducer is None or not reducer.in_flight

    def settle(self, exchanging: bool) -> None:
        """Exchange the rest of the gradients, as the other ranks do, and drop them: their step has failed."""
        reducer = getattr(self.value, "_mpiddp_reducer", None)
        if reducer is not None and exchanging:
            reducer.finish()
        self.value.zero_grad()


class SamplerHandler(Handler):
    """The place in an epoch: what was recorded by index on any rank counts on all of them."""

    def save(self) -> None:
        """Keep the place. Collective."""
        self._saved = self._joint()

    def sync(self) -> None:
        """Go to rank 0's place, less what any rank has recorded by index."""
        self.value.load_state_dict(broadcast_object(self._joint(), 0, f"elastic.{self.name}"))

    def reset(self) -> None:
        """Share what is left among the ranks that there are now. Collective."""
        self.value.load_state_dict(self._joint())

    def _joint(self) -> dict[str, Any]:
        recorded = self.value.recorded
        if any_rank(bool(recorded)):
            recorded = set().union(*allgather_object(recorded, f"elastic.{self.name}.recorded"))
        place: dict[str, Any] = self.value.place(recorded)
        return place


#: The first that fits; a class of the user's own that has the two methods needs no entry.
_KINDS: tuple[tuple[type, type[Handler]], ...] = (
    (torch.nn.Module, ModelHandler),
    (torch.optim.Optimizer, OptimizerHandler),
    (ElasticSampler, SamplerHandler),
)


def handler_of(name: str, value: Any) -> Handler | None:
    """The handler for ``value``; None where it is a plain object."""
    for kind, handler in _KINDS:
        if isinstance(value, kind):
            return handler(name, value)
    has_state = all(callable(getattr(value, method, None)) for method in ("state_dict", "load_state_dict"))
    return Handler(name, value) if has_state and not isinstance(value, type) else None
