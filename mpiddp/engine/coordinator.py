"""The other side of the negotiation: counts who has submitted what, and says what runs, in which order. Pure.

Each process set has one, with its member 0. It sends every member an ordered run list as requests become ready; only
that list starts exchanges. Nothing is sent while nothing changes, and nothing here waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

from .. import trace
from ..errors import StallError
from .bucket import fuse
from .groups import Announced, Groups
from .mismatch import problem
from .request import Key, Kind, Signature, automatic_name
from .run_lists import RunLists
from .wire import ALL_LEFT, CYCLE, JOINED, LEFT, MET, NEWS, RESET, RUN

__all__ = ["Coordinator"]


class Coordinator:
    """``ranks`` are the members' world ranks, for the errors."""

    def __init__(self, ranks: Sequence[int], fusion_nbytes: int) -> None:
        self.ranks = list(ranks)
        self.size = len(ranks)
        self.announced: dict[Key, Announced] = {}
        self.joined: dict[int, int] = {}  # how many unnamed requests each had submitted before
        self.left: dict[int, int] = {}
        self.heard = 0  # messages so far
        self.news: dict[str, Callable[..., None]] = {}  # who hears what members tell, by topic; else all members do
        self._given_up: dict[Key, tuple[set[int], str]] = {}  # who has still to be told, and what
        self._fusion_nbytes = fusion_nbytes
        self._tables: list[list[tuple[str | None, Signature]]] = [[] for _ in ranks]
        self._known: dict[Signature, Signature] = {}
        self._ready: list[tuple[Key, Announced]] = []
        self._groups = Groups()
        self._just_joined: list[int] = []
        self._lists = RunLists(self.ranks)

    # -- what comes in -------------------------------------------------------------------------------------------------

    def receive(self, member: int, message: Iterable[tuple[Any, ...]]) -> None:
        """A message of ``member``."""
        self.heard += 1
        for item in message:
            if item[0] >= 0:
                self._submitted(member, item)
            elif item[0] == RESET:
                self._tables[member].clear()
            elif item[0] == LEFT:
                self._has_left(member, item[2], item[3])
            elif item[0] == CYCLE:
                for other in self.joined:
                    self._lists.tell(other, *item)
            elif item[0] == NEWS:
                self._pass_on(member, item)
            elif item[0] == MET:
                self.announced.pop(item[1], None)

    def _pass_on(self, member: int, item: tuple[Any, ...]) -> None:
        if item[1] in self.news:
            self.news[item[1]](member, *item[2:])
            return
        self._lists.tell_all(*item)

    def tell(self, member: int, *notice: Any) -> None:
        """Send a notice with the next messages."""
        self._lists.tell(member, *notice)

    def _submitted(self, member: int, item: tuple[Any, ...]) -> None:
        table = self._tables[member]
        if len(item) > 5:
            signature = Signature(*item[6])
            table.append((item[5], self._known.setdefault(signature, signature)))
            if len(self._known) > 4 * len(table) + 4096:
                self._known.clear()
            item = item[:5]
        number, index, automatic, extent, payload = item
        name, signature = table[index]
        key = automatic if name is None else name
        if (self._given_up or self._groups.failed) and self._answer_late(member, key, number, signature):
            return  # although others may have submitted the name anew
        record = self.announced.get(key)
        if record is None:
            record = self.announced[key] = Announced(signature)
        elif signature is not record.signature and signature != record.signature:
            record.differs = {**(record.differs or {}), member: signature}
        record.numbers[member] = number
        if trace.active():
            shown = name if name is not None else automatic_name(signature.kind, key)
            trace.instant("rank ready", name=shown, rank=self.ranks[member], ranks=tuple(self.ranks))
        if extent:
            record.extents = record.extents or {}
            record.extents[member] = extent
        if payload is True:
            record.met += 1
        elif payload is not None:
            record.payloads = record.payloads or {}
            record.payloads[member] = payload
        if signature.kind == Kind.JOIN:
            self.joined[member] = extent[0]
            self._just_joined.append(member)
            self._fail_joins()
        elif self.joined or self.left:
            self._look(key, record)
        elif len(record.numbers) == self.size:
            self._complete(key, record)

    def _look(self, key: Key, record: Announced) -> None:
        """Is it ready, now that somebody has submitted, joined or left?"""
        missing = [member for member in range(self.size) if member not in record.numbers] if self._absent else []
        if any(member in self.left for member in missing):
            del self.announced[key]  # nobody needs to come any more: whoever does gets the same error
            self._ready += self._fail_group(key, record)
            return
        if len(record.numbers) + len(missing) < self.size:
            return
        if any(member not in self.joined for member in missing):
            return
        if record.met and isinstance(key, int) and any(key <= self.joined[member] for member in missing):
            del self.announced[key]  # who joined had come to it, without a word: they have all met
            return
        self._complete(key, record)

    def _complete(self, key: Key, record: Announced) -> None:
        """Nobody is to come any more."""
        del self.announced[key]
        if record.differs:
            self._ready += self._fail_group(key, record)
        elif record.signature.group:
            self._ready += self._groups.gather(key, record)
        elif record.met == self.size:
            return  # they meet without a word
        elif record.payloads is None or self.joined or not self._lists.answer([record]):
            self._ready.append((key, record))

    def _fail_group(self, key: Key, record: Announced) -> list[tuple[Key, Announced]]:
        """``record`` cannot run, and so nothing of its group does."""
        error = problem(key, record, self.ranks, self.left)
        assert error is not None
        doomed = self._groups.fail(key, record, error, self.announced)
        for other, entry in doomed:
            entry.error = error
            self.announced.pop(other, None)
        return doomed

    def give_up(self, keys: Iterable[Key], text: str) -> None:
        """Those who have submitted these get a StallError, and the others when they come at last."""
        for key in keys:
            record = self.announced.pop(key, None)
            if record is not None:
                self._run([record], (StallError.__name__, text))
                self._given_up[key] = set(range(self.size)) - record.numbers.keys(), text
                if record.signature.kind == Kind.JOIN:
                    self._forget_joined(record)

    def _answer_late(self, member: int, key: Key, number: int, signature: Signature) -> bool:
        error = self._groups.late(member, key, signature)
        if error is not None:
            self._lists.tell(member, RUN, [number], [], error, None)
            return True
        awaited, text = self._given_up.get(key, (set(), ""))
        if member not in awaited:
            return False
        self._lists.tell(member, RUN, [number], [], (StallError.__name__, text), None)
        awaited.remove(member)
        if not awaited:
            del self._given_up[key]
        return True

    @property
    def _absent(self) -> bool:
        return bool(self.joined or self.left)

    def _look_again(self) -> None:
        for key, record in list(self.announced.items()):
            if record.signature.kind != Kind.JOIN and key in self.announced:
                self._look(key, record)

    def _has_left(self, member: int, steps: int, launched: list[int]) -> None:
        if member in self.left:
            return
        self.left[member] = steps
        self._lists.tell_all(LEFT, self.ranks[member], steps, launched)
        self._fail_joins()
        self._look_again()
        if len(self.left) == self.size:
            self._lists.tell_all(ALL_LEFT)

    def _forget_joined(self, record: Announced) -> None:
        for member in record.numbers:
            self.joined.pop(member, None)

    def _fail_joins(self) -> None:
        """Somebody has left without joining: those who wait in join() would wait for ever."""
        for key, record in list(self.announced.items()):
            if record.signature.kind == Kind.JOIN and not self.left.keys() <= record.numbers.keys():
                del self.announced[key]
                self._run([record], problem(key, record, self.ranks, self.left))
                self._forget_joined(record)
                self._just_joined.clear()
                self._lists.tell_all(JOINED, False)

    # -- what goes out -------------------------------------------------------------------------------------------------

    def messages(self) -> Iterable[tuple[int, list[tuple[Any, ...]]]]:
        """What each member has to be told since the last call; member 0, which is here, last."""
        if self._just_joined:
            self._settle_joins()
        if self._ready:
            self._schedule()
        if not self._lists:
            return []
        trace.instant("cycle")
        return self._lists.take()

    def _settle_joins(self) -> None:
        """Those who joined in one round joined at once: the highest of them counts as the last.

        What was submitted before the last one joined runs before the join ends, since it needs those who joined.
        """
        just_joined, self._just_joined = self._just_joined, []
        self._look_again()
        if len(self.joined) < self.size:
            self._lists.tell_all(JOINED, True)
            return
        self._schedule()
        last = self.ranks[max(just_joined)]
        self.joined.clear()
        for key in [key for key, record in self.announced.items() if record.signature.kind == Kind.JOIN]:
            record = self.announced.pop(key)
            unnamed = max(extent[0] for extent in self._lists.extents(record))
            for member in range(self.size):
                self._lists.tell(member, RUN, [record.numbers[member]], [(last, unnamed)], None, None)
            self._lists.tell_all(JOINED, False)

    def _schedule(self) -> None:
        ready, self._ready = self._ready, []
        if len(ready) == 1 and self._is_sound(ready[0][1]):
            self._run([ready[0][1]], None)
            return
        errors = [
            None if self._is_sound(record) else record.error or problem(key, record, self.ranks, self.left)
            for key, record in ready
        ]
        for group in fuse([record.signature for _, record in ready], self._fusion_nbytes):
            sound = [ready[i][1] for i in group if errors[i] is None]
            if self.joined:  # one exchange serves one set of members: to each of them all of it is known, or nothing
                for _, records in groupby(sound, lambda record: sorted(record.numbers)):
                    self._run(list(records), None)
            elif sound:
                self._run(sound, None)
            for i in group:
                if errors[i] is not None:
                    self._run([ready[i][1]], errors[i])

    def _run(self, records: list[Announced], error: tuple[str, str] | None) -> None:
        self._lists.run(records, error, self.joined)

    def _is_sound(self, record: Announced) -> bool:
        return record.error is None and len(record.numbers) == self.size and not record.differs
