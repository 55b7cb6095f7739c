"""What PowerSGD remembers from step to step, as a part of the optimizer's state_dict()."""

from __future__ import annotations

import logging
from typing import Any

import torch

from ...engine import Lane
from ..wrapped import Wrapped
from .layout import PowerLayout
from .wire import PowerWire

__all__ = ["Memory", "Remembering"]

logger = logging.getLogger("mpiddp")


class Memory:
    """The count of steps and each parameter's Q are the same on every rank; the errors are each rank's own."""

    def __init__(self, lane: Lane, wire: PowerWire, layout: PowerLayout) -> None:
        self._lane, self._wire, self._layout = lane, wire, layout

    def common(self) -> dict[str, Any]:
        """What is the same on every rank: few bytes."""
        qs = {index: q.clone() for index, (_, q) in self._layout.remembered.items()}
        return {"steps": self._wire.steps, "q": qs}

    def whole(self) -> dict[str, Any]:
        """With this rank's errors (by the parameter's index, as they are kept), and which rank of how many it is."""
        errors = {index: error for index, (error, _) in self._layout.remembered.items()}
        link = self._lane.link
        return {**self.common(), "rank": link.rank, "size": link.size, "error": errors}

    @torch.no_grad()
    def take(self, kept: dict[str, Any]) -> None:
        """Go on from what :meth:`whole` or :meth:`common` gave. To be called on every rank, or the common part of one
        rank's given to all.

        Errors are taken over where they are those of this rank among as many; else they are zeros, which is said.
        They stay as they are where none are given.
        """
        self._wire.steps = kept["steps"]
        link, errors = self._lane.link, kept.get("error")
        if errors and (kept["rank"], kept["size"]) != (link.rank, link.size):
            logger.warning(
                "PowerSGD: what compression left out of gradients was saved by rank %d of %d, and this is rank %d of "
                "%d: it is not taken over, which costs what one step left out. Save state_dict() on every rank and "
                "load each rank's own, or use mpiddp.checkpoint", kept["rank"], kept["size"], link.rank, link.size,
            )  # fmt: skip
            errors = {}
        self._layout.remember(kept["q"], errors)


class Remembering(Wrapped):
    """Mixed into the optimizer's class: what the compression remembers is a part of its state."""

    _mpiddp_reducer: Any

    def _mpiddp_memory(self) -> Memory | None:
        """What is remembered; None with a compression that remembers nothing."""
        reducer = self._mpiddp_reducer
        if not isinstance(reducer.wire, PowerWire) or not isinstance(reducer.layout, PowerLayout):
            return None
        return Memory(reducer.lane, reducer.wire, reducer.layout)

    def state_dict(self) -> dict[str, Any]:
        """As the wrapped class's; with ``Compression.powersgd`` also what that remembers, as ``"powersgd"``."""
        state_dict: dict[str, Any] = super().state_dict()  # type: ignore[misc]
        memory = self._mpiddp_memory()
        return state_dict if memory is None else {**state_dict, "powersgd": memory.whole()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the wrapped class's, and what ``Compression.powersgd`` remembered, where there is some."""
        super().load_state_dict(state_dict)  # type: ignore[misc]
        memory = self._mpiddp_memory()
        if memory is not None and "powersgd" in state_dict:
            memory.take(state_dict["powersgd"])
