"""Requests that can run no more, although some members have still to submit them: they get the error then. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from .request import Key

__all__ = ["Awaited"]


class Awaited:
    """Who has still to be told, and what: the class and the text of an error, and whether that concerns the whole group
    of the request, of which nothing else has been submitted. What failed several times is told in that order."""

    def __init__(self) -> None:
        self.of: dict[Key, list[tuple[set[int], tuple[str, str], bool]]] = {}  # empty nearly always

    def add(self, key: Key, members: Iterable[int], error: tuple[str, str], whole_group: bool = False) -> None:
        """``members`` are those who have not submitted ``key``."""
        members = set(members)
        if members:
            self.of.setdefault(key, []).append((members, error, whole_group))

    def take(self, member: int, key: Key) -> tuple[tuple[str, str], bool] | None:
        """The error of ``key``, which ``member`` submits at last, and whether it is its group's; None if nobody waits
        for that."""
        for entry in self.of.get(key, ()):
            members, error, whole_group = entry
            if member in members:
                members.remove(member)
                if not members:
                    self._drop(key, entry)
                return error, whole_group
        return None

    def _drop(self, key: Key, entry: tuple[set[int], tuple[str, str], bool]) -> None:
        self.of[key].remove(entry)
        if not self.of[key]:
            del self.of[key]

    def forget(self, member: int) -> None:
        """``member`` has joined and submits none of them; what it submits later is anew."""
        for key in list(self.of):
            while self.take(member, key) is not None:
                pass

    def __repr__(self) -> str:
        return f"Awaited({len(self.of)} requests)"
