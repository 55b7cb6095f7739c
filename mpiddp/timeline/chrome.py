"""From records to Chrome's trace event format. Pure.

A process is a rank, a thread is a row: one for each tensor, whose phases follow each other: negotiate (from submission
until it is known to be ready on all ranks), queue, pack, exchange, unpack. Operations without a name share rows, as
many as are in flight at once. On the coordinator's rows a tick tells when each rank became ready.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .recorder import Record, Tensor

__all__ = ["Chrome"]

_UNNAMED = re.compile(r"(\w+\.unnamed)\.[\d.]+")
#: Ticks of tensors that this rank itself has not submitted yet are kept back for so many tensors.
_MOST_EARLY = 4096

_Key = tuple[tuple[tuple[int, ...], int], str]


@dataclass
class _Flight:
    """A tensor between its submission and its end."""

    row: int
    submitted_ns: int | None = None
    queued_ns: int | None = None


class Chrome:
    """``shift_ns`` is added to all times; ``size`` is that of the world."""

    def __init__(self, rank: int, size: int, host: str, shift_ns: int = 0, mark_cycles: bool = False) -> None:
        self._rank, self._world, self._host = rank, tuple(range(size)), host
        self._shift_ns, self._mark_cycles = shift_ns, mark_cycles
        self._rows: dict[tuple[Any, str, int], int] = {}
        self._flights: dict[_Key, _Flight] = {}
        self._taken: dict[tuple[Any, str], set[int]] = {}
        self._slots: dict[_Key, int] = {}
        self._early: dict[_Key, list[tuple[int, int]]] = {}
        self._open: dict[int, tuple[str, int, list[int]]] = {}
        self._fresh: list[str] = []

    def lines(self, records: Iterable[Record], now_ns: int) -> Iterator[str]:
        """The events, a JSON object each; what has not ended is shown until ``now_ns``."""
        yield self._meta("process_name", name=f"rank {self._rank} on {self._host}")
        yield self._meta("process_sort_index", sort_index=self._rank)
        for record in records:
            found = list(self._event(record))
            yield from self._fresh  # the rows that they need
            self._fresh.clear()
            yield from found
        rest = list(self._unfinished(now_ns))
        yield from self._fresh
        yield from rest

    def _event(self, record: Record) -> Iterator[str]:
        if record.phase == "B":
            yield from self._begins(record)
        elif record.phase == "E":
            name, since_ns, rows = self._open.pop(record.number, ("", 0, []))
            fused = {"fused": len(rows)} if len(rows) > 1 else {}
            for row in rows:
                yield self._slice(name, since_ns, record.at_ns, row, **fused)
        elif record.name == "cycle":
            if self._mark_cycles:
                yield self._tick("cycle", record.at_ns, self._row(("", "negotiation", 0), "negotiation"))
        elif record.name == "rank ready":
            yield from self._ready(record)
        else:
            for tensor in record.tensors:
                yield from self._changes(record, tensor)

    def _begins(self, record: Record) -> Iterator[str]:
        rows = []
        for tensor in record.tensors:
            flight = self._flight(tensor)
            rows.append(flight.row)
            if flight.queued_ns is not None:
                yield self._slice("queue", flight.queued_ns, record.at_ns, flight.row)
                flight.queued_ns = None
        if not record.tensors:
            rows.append(self._row(("", record.name, 0), record.name))
        self._open[record.number] = record.name, record.at_ns, rows

    def _changes(self, record: Record, tensor: Tensor) -> Iterator[str]:
        """A tensor was submitted, is ready on all ranks, or done."""
        key, at_ns = (tensor.where, tensor.name), record.at_ns
        flight = self._flight(tensor)
        if record.name == "submitted":
            if tensor.where[1] >= 0:  # a lane's: there is nothing to negotiate
                flight.queued_ns = at_ns
            else:
                flight.submitted_ns = at_ns
            for early_ns, rank in self._early.pop(key, ()):
                yield self._tick(f"rank {rank} ready", early_ns, flight.row)
            return
        if flight.submitted_ns is not None:
            yield self._slice("negotiate", flight.submitted_ns, at_ns, flight.row)
            flight.submitted_ns = None
        if record.name == "ready":
            flight.queued_ns = at_ns
            return
        if flight.queued_ns is not None:
            yield self._slice("queue", flight.queued_ns, at_ns, flight.row)
        if tensor.error:
            yield self._tick(f"failed: {tensor.error}", at_ns, flight.row)
        del self._flights[key]
        self._release(key)

    def _ready(self, record: Record) -> Iterator[str]:
        (tensor,) = record.tensors
        key = tensor.where, tensor.name
        if key in self._flights or not _UNNAMED.fullmatch(tensor.name):
            yield self._tick(f"rank {record.rank} ready", record.at_ns, self._flight_row(tensor))
            return
        self._early.setdefault(key, []).append((record.at_ns, record.rank))
        if len(self._early) > _MOST_EARLY:  # this rank has joined, perhaps, and will never submit them
            self._early.pop(next(iter(self._early)))

    def _unfinished(self, now_ns: int) -> Iterator[str]:
        for name, since_ns, rows in self._open.values():
            for row in rows:
                yield self._slice(name, since_ns, now_ns, row, unfinished=True)
        for flight in self._flights.values():
            for name, at_ns in (("negotiate", flight.submitted_ns), ("queue", flight.queued_ns)):
                if at_ns is not None:
                    yield self._slice(name, at_ns, now_ns, flight.row, unfinished=True)
        for (where, name), ticks in self._early.items():
            for early_ns, rank in ticks:
                yield self._tick(f"rank {rank} ready", early_ns, self._row((where, name, 0), name))

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _flight(self, tensor: Tensor) -> _Flight:
        key = tensor.where, tensor.name
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight(self._flight_row(tensor))
        return flight

    def _flight_row(self, tensor: Tensor) -> int:
        ranks, lane = tensor.where
        unnamed = _UNNAMED.fullmatch(tensor.name)
        name, slot = tensor.name, 0
        if unnamed:
            name, slot = unnamed[1], self._take((tensor.where, tensor.name), unnamed[1])
        label = f"optimizer {lane}: {name}" if lane >= 0 else name
        if unnamed and slot:
            label += f" ({slot + 1})"
        if ranks not in ((), self._world):
            label += f" (ranks {', '.join(map(str, ranks))})"
        return self._row((tensor.where, name, slot), label)

    def _take(self, key: _Key, name: str) -> int:
        """The lowest row that no other operation without a name is on."""
        if key not in self._slots:
            taken = self._taken.setdefault((key[0], name), set())
            self._slots[key] = next(slot for slot in range(len(taken) + 1) if slot not in taken)
            taken.add(self._slots[key])
        return self._slots[key]

    def _release(self, key: _Key) -> None:
        slot = self._slots.pop(key, None)
        unnamed = _UNNAMED.fullmatch(key[1])
        if slot is not None and unnamed:
            self._taken[key[0], unnamed[1]].discard(slot)

    def _row(self, key: tuple[Any, str, int], label: str) -> int:
        row = self._rows.get(key)
        if row is None:
            row = self._rows[key] = len(self._rows)
            self._fresh.append(self._meta("thread_name", row, name=label))
            self._fresh.append(self._meta("thread_sort_index", row, sort_index=row))
        return row

    # -- events --------------------------------------------------------------------------------------------------------

    def _slice(self, name: str, since_ns: int, until_ns: int, row: int, **args: Any) -> str:
        said = f', "args": {json.dumps(args)}' if args else ""
        return (
            f'{{"name": {json.dumps(name)}, "cat": "mpiddp", "ph": "X", "pid": {self._rank}, "tid": {row}, '
            f'"ts": {self._us(since_ns + self._shift_ns)}, "dur": {self._us(max(until_ns - since_ns, 0))}{said}}}'
        )

    def _tick(self, name: str, at_ns: int, row: int) -> str:
        return (
            f'{{"name": {json.dumps(name)}, "cat": "mpiddp", "ph": "i", "s": "t", "pid": {self._rank}, "tid": {row}, '
            f'"ts": {self._us(at_ns + self._shift_ns)}}}'
        )

    def _meta(self, what: str, row: int | None = None, **args: Any) -> str:
        thread = "" if row is None else f', "tid": {row}'
        return f'{{"name": "{what}", "ph": "M", "pid": {self._rank}{thread}, "args": {json.dumps(args)}}}'

    @staticmethod
    def _us(ns: int) -> str:
        return f"{ns // 1000}.{ns % 1000:03d}"
