"""What an exchange is."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

__all__ = ["Steps", "Until", "drain"]

_T = TypeVar("_T")

#: Yields whenever it waits for a peer, and then has a result; another value than last time says that it has moved
#: meanwhile.
Until = Generator[int | None, None, _T]

#: An exchange under way.
Steps = Until[None]


def drain(steps: Steps) -> None:
    """Run an exchange to its end: the blocking form of any collective."""
    for _ in steps:
        pass
