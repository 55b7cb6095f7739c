"""``max_grad_norm``: what step() does before it begins."""

from __future__ import annotations

import math
from typing import Any

from ..op import Adasum, Op
from .closures import Arguments, closure_of, followed_by

__all__ = ["check_max_norm", "clip_before_steps"]


def check_max_norm(max_norm: float | None, op: Op) -> None:
    """Raise ValueError unless ``max_norm`` is None or a positive number that goes with ``op``."""
    if max_norm is None:
        return
    if isinstance(max_norm, bool) or not isinstance(max_norm, (int, float)) or math.isnan(max_norm) or max_norm <= 0:
        raise ValueError(f"max_grad_norm is a positive number, or None for no clipping, not {max_norm!r}")
    if op is Adasum:
        raise ValueError(
            "op=Adasum combines steps, and no rank has averaged gradients whose norm max_grad_norm could clip; clip "
            "the local ones before step()"
        )


def clip_before_steps(optimizer: Any, max_norm: float | None) -> None:
    """Have ``optimizer.step()`` call ``optimizer.clip_grad_norm_(max_norm)`` first, or after the closure."""
    if max_norm is None:
        return

    def before(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if closure_of(args, kwargs) is not None:
            return followed_by(lambda: optimizer.clip_grad_norm_(max_norm), args, kwargs)
        optimizer.clip_grad_norm_(max_norm)
        return None

    optimizer.register_step_pre_hook(before)
