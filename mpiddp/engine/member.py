"""One rank's side of the negotiation: what it has submitted and not yet been told to run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from . import eager
from .request import Kind, Request, Signature
from .wire import MET, RESET, RUN, TABLE_ENTRIES

__all__ = ["Member", "Run"]


@dataclass(slots=True)
class Run:
    """Start now: these requests in one exchange. ``extents`` has one tuple a member, where the kind has any.

    A rank that has joined gets ``phantoms`` in place of requests: the signatures of what it never submitted.
    """

    requests: list[Request]
    extents: list[tuple[int, ...]]
    error: tuple[str, str] | None
    payload: bytes | None
    phantoms: list[Signature]


class Member:
    """Announces each request once; names and signatures travel in full once and as numbers afterwards."""

    def __init__(self) -> None:
        self.waiting: dict[int, Request] = {}
        self.outbox: list[tuple[Any, ...]] = []
        self._next = 0
        self._table: dict[Any, int] = {}

    def submit(self, request: Request, is_met: bool = False) -> int:
        """Announce ``request`` with the next message; its number. ``is_met``: it has been published."""
        number = self._next
        self._next = number + 1
        self.waiting[number] = request
        key, signature = request.key, request.signature
        entry: tuple[Any, ...]
        if isinstance(key, str):
            entry, automatic = (key, signature), None
        else:
            entry, automatic = (None, signature), key
        payload = True if is_met else eager.content(request.flat) if request.eager else None
        index = self._table.get(entry)
        if index is not None:
            self.outbox.append((number, index, automatic, request.extent, payload))
            return number
        if len(self._table) >= TABLE_ENTRIES:
            self._table.clear()
            self.outbox.append((RESET,))
        index = self._table[entry] = len(self._table)
        self.outbox.append((number, index, automatic, request.extent, payload, entry[0], tuple(signature)))
        return number

    def withdraw(self, number: int) -> None:
        """What was announced under this number is done, by all."""
        request = self.waiting.pop(number, None)
        if request is not None:
            self.outbox.append((MET, request.key))

    def notice(self, *notice: Any) -> None:
        """Tell the coordinator something with the next message."""
        self.outbox.append(notice)

    def message(self) -> list[tuple[Any, ...]]:
        """What the coordinator has not heard yet."""
        outbox, self.outbox = self.outbox, []
        return outbox

    def read(self, message: Iterable[tuple[Any, ...]]) -> tuple[list[Run], list[tuple[Any, ...]]]:
        """What a message of the coordinator says: what runs, and the notices."""
        runs, notices = [], []
        for item in message:
            if item[0] != RUN:
                notices.append(item)
                continue
            _, numbers, extents, error, payload = item
            if numbers and isinstance(numbers[0], tuple):
                runs.append(Run([], extents, error, payload, [Signature(*signature) for signature in numbers]))
            else:
                waiting = [self.waiting.pop(number) for number in numbers if number in self.waiting]  # not withdrawn
                if waiting:
                    runs.append(Run(waiting, extents, error, payload, []))
        return runs, notices

    def joining(self) -> bool:
        """Whether this rank has joined and waits for the others to."""
        return any(request.signature.kind == Kind.JOIN for request in self.waiting.values())
