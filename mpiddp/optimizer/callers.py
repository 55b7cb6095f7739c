"""What hooks and lanes call of a reducer, without keeping it alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import CollectiveError

if TYPE_CHECKING:
    from .reducer import Reducer

__all__ = ["caller", "mirror"]


def mirror(this: weakref.ref[Reducer]) -> None:
    """Take part in the others' cycle."""
    reducer = this()
    if reducer is None:
        raise CollectiveError(
            "this rank has joined, others go on training, and its DistributedOptimizer is gone: keep it until join() "
            "returns"
        )
    reducer.take_part_without_data()


def caller(this: weakref.ref[Reducer], index: int, name: str) -> Callable[[], None]:
    """What a hook calls; it does not keep the reducer alive."""

    def call() -> None:
        reducer = this()
        if reducer is not None:
            with reducer.turn:
                getattr(reducer, name)(index)

    return call
