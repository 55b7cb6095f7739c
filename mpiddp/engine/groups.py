"""Requests as a coordinator sees them, and groups: those that run together or not at all. Pure."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from .request import Key, Signature

__all__ = ["Announced", "Groups", "group_of"]


class Announced:
    """A request that some members have submitted, as the coordinator sees it."""

    __slots__ = ("differs", "error", "extents", "met", "numbers", "payloads", "signature", "since_s")

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self.numbers: dict[int, int] = {}
        self.extents: dict[int, tuple[int, ...]] | None = None  # these three are made when something comes
        self.payloads: dict[int, bytes] | None = None
        self.met = 0  # how many meet the others, if all do
        self.differs: dict[int, Signature] | None = None
        self.error: tuple[str, str] | None = None
        self.since_s = time.monotonic()

    def signatures(self) -> list[tuple[int, Signature]]:
        """Each member's signature."""
        differs = self.differs or {}
        return [(member, differs.get(member, self.signature)) for member in sorted(self.numbers)]


_Name = str | int
_Entry = tuple[Key, Announced]
_Error = tuple[str, str]


def group_of(key: Key, signature: Signature) -> _Name | None:
    """The name of the request's group, or its number if it has none; None for a request that is in no group."""
    if not signature.group:
        return None
    if isinstance(key, str):
        return signature.group[0]
    return key if isinstance(key, int) else key[0]


def _size(signature: Signature) -> int:
    return signature.group[1] if signature.group else 1


class Groups:
    """What has come of each group, and who still has to be told that a group has failed.

    A member submits all of a group at once, so whoever has submitted a part of it will submit the rest.
    """

    def __init__(self) -> None:
        self._gathered: dict[_Name, list[_Entry]] = {}
        self.failed: dict[tuple[_Name, int], tuple[int, _Error]] = {}  # of a member, how many are to come

    def gather(self, key: Key, record: Announced) -> list[_Entry]:
        """All members have submitted ``record``, alike. The whole group if this was the last of it, else nothing."""
        name = group_of(key, record.signature)
        if name is None:
            return [(key, record)]
        gathered = self._gathered.setdefault(name, [])
        gathered.append((key, record))
        if len(gathered) < _size(record.signature):
            return []
        return sorted(self._gathered.pop(name), key=lambda entry: entry[1].numbers.get(0, 0))

    def fail(self, key: Key, record: Announced, error: _Error, announced: Mapping[Key, Announced]) -> list[_Entry]:
        """``record`` cannot run: all that cannot run either, of what is here; what is still to come gets the error."""
        doomed = {key: record}
        names: set[_Name] = set()
        while new := self._names(doomed.items()) - names:
            names |= new
            for name in new:
                doomed.update(self._gathered.pop(name, ()))
            doomed.update((k, r) for k, r in announced.items() if names & self._names([(k, r)]))
        to_come: dict[tuple[_Name, int], int] = {}
        for each, entry in doomed.items():
            for member, signature in entry.signatures():
                mine = group_of(each, signature)
                if mine is not None:
                    to_come[mine, member] = to_come.get((mine, member), _size(signature)) - 1
        self.failed.update({place: (count, error) for place, count in to_come.items() if count})
        return list(doomed.items())

    def late(self, member: int, key: Key, signature: Signature) -> _Error | None:
        """The error of a request whose group has failed already."""
        name = group_of(key, signature) if self.failed else None
        if name is None or (name, member) not in self.failed:
            return None
        count, error = self.failed.pop((name, member))
        if count > 1:
            self.failed[name, member] = count - 1, error
        return error

    @staticmethod
    def _names(entries: Iterable[_Entry]) -> set[_Name]:
        found = {group_of(key, signature) for key, record in entries for _, signature in record.signatures()}
        return {name for name in found if name is not None}

    def __len__(self) -> int:
        """How many are not over."""
        return len(self._gathered) + len(self.failed)
