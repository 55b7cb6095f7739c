"""What a coordinator has to tell each member: what runs, in one order for all, and notices."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from . import eager
from .groups import Announced
from .request import Kind
from .wire import RUN

__all__ = ["RunLists"]


class RunLists:
    """``ranks`` are the members' world ranks."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self._ranks = ranks
        self._outboxes: list[list[tuple[Any, ...]]] = [[] for _ in ranks]

    def __bool__(self) -> bool:
        return any(self._outboxes)

    def take(self) -> list[tuple[int, list[tuple[Any, ...]]]]:
        """What each member has to be told since the last call; member 0, which is here, last."""
        outboxes, self._outboxes = self._outboxes, [[] for _ in self._ranks]
        return [(member, outboxes[member]) for member in reversed(range(len(outboxes))) if outboxes[member]]

    def tell(self, member: int, *item: Any) -> None:
        """One member."""
        self._outboxes[member].append(item)

    def tell_all(self, *item: Any) -> None:
        """Every member."""
        for outbox in self._outboxes:
            outbox.append(item)

    def run(self, records: list[Announced], error: tuple[str, str] | None, joined: Collection[int]) -> None:
        """These in one exchange; those who have joined know nothing of them."""
        if error is None and records[0].payloads and self.answer(records):
            return
        extents = self.extents(records[0])
        for member, outbox in enumerate(self._outboxes):
            numbers = [record.numbers[member] for record in records if member in record.numbers]
            if numbers:
                outbox.append((RUN, numbers, extents, error, None))
            elif member in joined and error is None:
                outbox.append((RUN, [tuple(record.signature) for record in records], extents, None, None))

    def extents(self, record: Announced) -> list[tuple[int, ...]]:
        """One of each member, where any has one."""
        return [record.extents.get(member, ()) for member in range(len(self._ranks))] if record.extents else []

    def answer(self, records: list[Announced]) -> bool:
        """Answer what came with its content; False where some member's content is missing."""
        if any(record.payloads is None or len(record.payloads) != len(record.numbers) for record in records):
            return False
        for record in records:
            assert record.payloads is not None
            contributions = [record.payloads[member] for member in sorted(record.payloads)]
            extents = self.extents(record)
            root = self._ranks.index(record.signature.root) if record.signature.kind == Kind.BROADCAST else 0
            payload = eager.answer(record.signature, contributions, root)
            for member, number in record.numbers.items():
                self.tell(member, RUN, [number], extents, None, payload)
        return True
