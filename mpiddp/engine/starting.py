"""Exchanges that the run list has named and that have not begun: in its order, each with its tag."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from ..transport.base import Steps
from .lane import FIRST_TAG
from .request import Handle
from .running import Running, beginning

__all__ = ["Starting"]

#: Exchanges of one channel that are resumed in turn; those behind them wait. Bounds the memory for scratch buffers.
_RUNNING = 16


class Starting:
    """State: belongs to whoever pushes the channel."""

    def __init__(self) -> None:
        self._queue: deque[tuple[int, list[Handle], Callable[[], Steps]]] = deque()
        self._tag = 0

    def __bool__(self) -> bool:
        return bool(self._queue)

    def add(self, handles: Sequence[Handle], build: Callable[[int], Callable[[], Steps]]) -> None:
        """``build`` gets the tag: the next one, on all members."""
        tag = self._tag
        self._tag = (tag + 1) % FIRST_TAG
        self._queue.append((tag, list(handles), build(tag)))

    def start(self, running: list[Running]) -> bool:
        """Add to ``running`` what can begin. True if anything could.

        Those of lanes, and meetings, do not count: others may come to theirs only after one that is to begin here.
        """
        tags = [other.number for other in running if other.number >= 0 and other.lane < 0]
        moved = False
        while self._queue and len(tags) < _RUNNING and self._queue[0][0] not in tags:
            tag, handles, build = self._queue.popleft()
            tags.append(tag)
            running.append(Running(handles, beginning(build), number=tag))
            moved = True
        return moved

    def clear(self) -> list[Handle]:
        """Forget all; their handles."""
        handles = [handle for _, group, _ in self._queue for handle in group]
        self._queue.clear()
        return handles
