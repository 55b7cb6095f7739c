"""The closure that ``step()`` may be given, as a hook for steps finds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Arguments", "closure_of", "followed_by"]

#: What such a hook is given, and may give in its place.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """The closure; None where there is none. ``args[0]`` is the optimizer."""
    closure: Callable[[], Any] | None = args[1] if len(args) > 1 else kwargs.get("closure")
    return closure


def followed_by(then: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The arguments, with a closure that calls ``then()`` each time it has been evaluated."""
    closure = closure_of(args, kwargs)
    assert closure is not None

    def both() -> Any:
        loss = closure()
        then()
        return loss

    return (args[0], both, *args[2:]), {key: value for key, value in kwargs.items() if key != "closure"}
