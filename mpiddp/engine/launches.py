"""What lanes have launched and is not started yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ..transport.base import Link, Steps
from .departures import Departures
from .lane import Lane
from .request import Handle
from .running import Running, finishing

__all__ = ["Launches"]

_Launch = tuple[Handle, int, int, Callable[[Link], Steps], Any]


class Launches:
    """State: ``_new``, to which anybody may append at any time, and ``_held``, which whoever pushes owns."""

    def __init__(self) -> None:
        self._new: deque[_Launch] = deque()
        self._held: deque[_Launch] = deque()  # in order; their tags are in use

    def __bool__(self) -> bool:
        return bool(self._new or self._held)

    def add(self, handle: Handle, lane: int, number: int, start: Callable[[Link], Steps], result: Any) -> None:
        """Start this with the next push."""
        self._new.append((handle, lane, number, start, result))

    def start(self, link: Link, lanes: Sequence[Lane], running: list[Running], departures: Departures) -> bool:
        """Add to ``running`` what can start. True if anything moved.

        Where a tag is still in use the launch waits, and those behind it with that tag: between two ranks, messages of
        one tag are told apart by their order alone.
        """
        while self._new:
            self._held.append(self._new.popleft())
        taken = {lanes[other.lane].tag(other.number) for other in running if other.lane >= 0}
        moved = False
        for _ in range(len(self._held)):
            entry = self._held.popleft()
            handle, lane, number, start, result = entry
            tag, lost = lanes[lane].tag(number), departures.lost_after(lane, number)
            if lost is not None:  # somebody has left since it was launched
                handle.fail(lost)
            elif tag in taken:
                self._held.append(entry)
                continue
            else:
                taken.add(tag)
                running.append(Running([handle], finishing(start, link, handle, result), lane, number))
            moved = True
        return moved

    def clear(self) -> list[Handle]:
        """Forget all; their handles."""
        handles = [entry[0] for entry in (*self._new, *self._held)]
        self._new.clear()
        self._held.clear()
        return handles
