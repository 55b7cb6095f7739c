"""Which requests are ready on every rank, and in which order they run. No collective, no waiting, no tensors.

Each process set has a coordinator, its member 0. A member sends it what it submitted since the last message, once;
the coordinator sends every member an ordered run list as requests become ready; only that list starts exchanges.
Nothing is sent while nothing changes. Names and signatures travel in full once and as numbers afterwards; the table
is bounded.
"""

from __future__ import annotations

import marshal
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .bucket import fuse
from .request import Kind, Request, Signature

__all__ = ["Coordinator", "Member", "Run"]

#: Version 2 of marshal's format is the same in every Python 3.
_MARSHAL = 2

#: Entries of the table of names and signatures; beyond it the table starts anew.
TABLE_ENTRIES = 4096

_ITEMSIZE = {"float64": 8, "int64": 8, "complex64": 8, "complex128": 16, "float32": 4, "int32": 4, "int16": 2}


def _encode(message: Any) -> bytes:
    return marshal.dumps(message, _MARSHAL)


def _nbytes(signature: Signature) -> int:
    return math.prod(signature.shape) * _ITEMSIZE.get(signature.dtype, 2)


@dataclass(slots=True)
class Run:
    """Start now: these requests in one exchange. ``extents`` has one tuple a member, where the kind has any."""

    requests: list[Request]
    extents: list[tuple[int, ...]]
    error: str | None = None


class Member:
    """One rank's side: what it has submitted and not yet been told to run."""

    def __init__(self) -> None:
        self.waiting: dict[int, Request] = {}
        self._next = 0
        self._outbox: list[Any] = []
        self._table: dict[Any, int] = {}

    def submit(self, request: Request) -> None:
        """Announce ``request`` with the next message."""
        number = self._next
        self._next += 1
        self.waiting[number] = request
        named = isinstance(request.key, str)
        entry = (request.key if named else None, tuple(request.signature))
        index = self._table.get(entry)
        if index is None:
            if len(self._table) >= TABLE_ENTRIES:
                self._table.clear()
                self._outbox.append(())
            index = self._table[entry] = len(self._table)
            self._outbox.append((number, index, None if named else request.key, request.extent, entry))
        else:
            self._outbox.append((number, index, None if named else request.key, request.extent))

    def message(self) -> bytes | None:
        """What the coordinator has not heard yet."""
        if not self._outbox:
            return None
        outbox, self._outbox = self._outbox, []
        return _encode(outbox)

    def runs(self, message: bytes) -> list[Run]:
        """What a message of the coordinator says."""
        return [
            Run([self.waiting.pop(number) for number in numbers], extents, error)
            for numbers, extents, error in marshal.loads(message)
        ]


@dataclass(slots=True)
class _Announced:
    """A request as the coordinator sees it: each member's number, signature and extent."""

    numbers: dict[int, int] = field(default_factory=dict)
    signatures: dict[int, Signature] = field(default_factory=dict)
    extents: dict[int, tuple[int, ...]] = field(default_factory=dict)


class Coordinator:
    """Counts who has submitted what, and says what runs."""

    def __init__(self, size: int, fusion_nbytes: int) -> None:
        self.size = size
        self.announced: dict[str | int, _Announced] = {}
        self._fusion_nbytes = fusion_nbytes
        self._tables: list[list[tuple[str | None, Signature]]] = [[] for _ in range(size)]
        self._ready: list[tuple[str | int, _Announced]] = []

    def receive(self, member: int, message: bytes) -> None:
        """A message of ``member``."""
        table = self._tables[member]
        for entry in marshal.loads(message):
            if not entry:
                table.clear()
                continue
            if len(entry) == 5:
                name, signature = entry[4]
                table.append((name, Signature(*signature)))
            number, index, automatic, extent = entry[:4]
            name, described = table[index]
            key = automatic if name is None else name
            record = self.announced.setdefault(key, _Announced())
            record.numbers[member] = number
            record.signatures[member] = described
            record.extents[member] = extent
            if len(record.numbers) == self.size:
                self._ready.append((key, self.announced.pop(key)))

    def messages(self) -> Iterable[tuple[int, bytes]]:
        """The run list of what has become ready since the last call, for each member."""
        if not self._ready:
            return []
        ready, self._ready = self._ready, []
        errors = [_mismatch(key, record) for key, record in ready]
        signatures = [record.signatures[0] for _, record in ready]
        lists: list[list[Any]] = [[] for _ in range(self.size)]
        for group in fuse(signatures, [_nbytes(s) for s in signatures], self._fusion_nbytes):
            for error, indices in _apart(group, errors):
                extents = self._extents(ready[indices[0]][1]) if len(indices) == 1 else []
                for member, run_list in enumerate(lists):
                    run_list.append(([ready[i][1].numbers[member] for i in indices], extents, error))
        return [(member, _encode(run_list)) for member, run_list in enumerate(lists)]

    def _extents(self, record: _Announced) -> list[tuple[int, ...]]:
        return [record.extents[m] for m in range(self.size)] if any(record.extents.values()) else []


def _apart(group: list[int], errors: list[str | None]) -> Iterable[tuple[str | None, list[int]]]:
    """A fused group less the requests that failed, each of which is reported alone, in order."""
    sound = [i for i in group if errors[i] is None]
    if sound:
        yield None, sound
    for i in group:
        if errors[i] is not None:
            yield errors[i], [i]


def _mismatch(key: str | int, record: _Announced) -> str | None:
    """None, or a sentence that names the request, what differs, the ranks and their values."""
    signatures = list(record.signatures.items())
    first = signatures[0][1]
    fields = sorted({name for _, other in signatures for name in first.differing(other)})
    if not fields:
        return None
    name = repr(key) if isinstance(key, str) else f"the unnamed operation number {key}"
    parts = []
    for field_name in fields:
        values: dict[str, list[int]] = {}
        for member, signature in sorted(signatures):
            values.setdefault(signature.show(field_name), []).append(member)
        said = "; ".join(
            f"{value} on rank{'s' if len(members) > 1 else ''} {', '.join(map(str, members))}"
            for value, members in values.items()
        )
        parts.append(f"the {field_name} is {said}")
    operation = Kind(first.kind).name.lower() if "kind" not in fields else "operation"
    hint = "; ranks that submit unnamed operations must do so in one order" if not isinstance(key, str) else ""
    return f"{operation} of {name}: the ranks disagree: {', and '.join(parts)}{hint}"
