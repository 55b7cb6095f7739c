"""TorchState: a model, an optimizer and whatever else training would have to go back to."""

from __future__ import annotations

from typing import Any

from .base import ObjectState
from .handlers import Handler, handler_of

__all__ = ["TorchState"]


class TorchState(ObjectState):
    """The state of training in PyTorch: ``TorchState(model, optimizer, sampler=sampler, epoch=0, batch=0)``.

    Each argument is an attribute. Modules, optimizers, ElasticSamplers, and anything with ``state_dict()`` and
    ``load_state_dict()`` (schedulers, GradScaler) are saved, restored and synchronised through these and stay the same
    objects; everything else is a plain object as in :class:`ObjectState`.
    """

    def __init__(self, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        self._handlers: dict[str, Handler] = {}
        plain = {}
        for name, value in {"model": model, "optimizer": optimizer, **kwargs}.items():
            handler = handler_of(name, value)
            if handler is None:
                plain[name] = value
            else:
                self._handlers[name] = handler
        self._check(self._handlers)
        super().__init__(**plain)
        for name, handler in self._handlers.items():
            object.__setattr__(self, name, handler.value)

    def __setattr__(self, name: str, value: Any) -> None:
        """An attribute that is set to another model or optimizer is looked after like the first."""
        handlers = self.__dict__.get("_handlers", {})
        if name in handlers and handlers[name].value is not value:
            handler = handler_of(name, value)
            if handler is None:
                raise TypeError(
                    f"{name} of this state is a {type(handlers[name].value).__name__} with a state of its own, and "
                    f"cannot become a {type(value).__name__}"
                )
            handlers[name] = handler
        super().__setattr__(name, value)

    def save(self) -> None:
        """Copy everything to host memory. Collective where there is a sampler, or an optimizer with ``shard=True``."""
        for handler in self._handlers.values():
            handler.save()
        super().save()

    def restore(self) -> None:
        """Load everything that was saved last."""
        for handler in self._handlers.values():
            handler.restore()
        super().restore()

    def sync(self) -> None:
        """Take over rank 0's models, optimizers and objects, and save them."""
        for handler in self._handlers.values():
            handler.sync()
        super().sync()

    def reset(self) -> None:
        """Samplers share what is left of the epoch among the ranks that there are now."""
        for handler in self._handlers.values():
            handler.reset()

    def is_settled(self) -> bool:
        """Whether no gradients are being exchanged."""
        return all(handler.is_settled() for handler in self._handlers.values())

    def settle(self, exchanging: bool) -> None:
        """Let optimizers end the exchange of gradients that a failed backward has begun."""
        for handler in self._handlers.values():
            handler.settle(exchanging)
