"""Start equal: what the root rank holds reaches every rank before the first step, and objects travel whole."""

from __future__ import annotations

from .objects import allgather_object, broadcast_object
from .optimizer_state import broadcast_optimizer_state
from .parameters import broadcast_parameters

__all__ = ["allgather_object", "broadcast_object", "broadcast_optimizer_state", "broadcast_parameters"]
