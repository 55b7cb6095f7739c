"""A sink that keeps what happens: a tuple each while it goes on, spilled to a nameless file, formatted afterwards."""

from __future__ import annotations

import marshal
import os
import tempfile
import threading
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from ..trace import Event

__all__ = ["Record", "Recorder", "Tensor"]

#: So many events are held in memory, about 10 MB; the 4th version of marshal writes what they share once.
_MOST_HELD = 20_000
_VERSION = 4


class Tensor(NamedTuple):
    """One of the tensors concerned: whose (see :class:`~mpiddp.engine.Handle`), its name, and what went wrong."""

    where: tuple[tuple[int, ...], int]
    name: str
    error: str = ""


class Record(NamedTuple):
    """An event without references to anything of the engine's. ``rank`` is who became ready, or -1."""

    phase: str
    name: str
    at_ns: int
    number: int
    tensors: tuple[Tensor, ...]
    rank: int = -1


class Recorder:
    """Call it with events; :meth:`replay` gives them back in order. State: ``_held``, guarded by ``_lock``."""

    def __init__(self) -> None:
        self._held: list[tuple[Any, ...]] = []
        self._spilled: IO[bytes] | None = None
        self._lock = threading.RLock()  # a signal handler may submit something while this thread is in here

    def __call__(self, event: Event) -> None:
        args = event.args
        rank = -1
        tensors: tuple[tuple[Any, ...], ...]
        if "of" in args:
            tensors = tuple((h.where, h.name, type(h.error).__name__ if h.error else "") for h in args["of"])
        elif "ranks" in args:
            rank, tensors = args["rank"], (((args["ranks"], -1), args["name"], ""),)
        else:
            tensors = ()
        with self._lock:
            self._held.append((event.phase, event.name, event.at_ns, event.number, tensors, rank))
            if len(self._held) >= _MOST_HELD:
                self._spill()

    def _spill(self) -> None:
        if self._spilled is None:
            self._spilled = tempfile.TemporaryFile(prefix="mpiddp-timeline-")  # noqa: SIM115
        held, self._held = self._held, []
        self._spilled.write(marshal.dumps(held, _VERSION))

    def replay(self) -> Iterator[Record]:
        """Everything since the beginning. To be called when nobody calls the recorder any more."""
        if self._spilled is not None:
            end, at = self._spilled.seek(0, os.SEEK_END), 0
            while at < end:
                self._spilled.seek(at)
                records = marshal.load(self._spilled)
                at = self._spilled.tell()
                yield from map(_record, records)
        yield from map(_record, self._held)

    def __repr__(self) -> str:
        return f"Recorder({len(self._held)} events held{', more spilled' if self._spilled else ''})"


def _record(values: tuple[Any, ...]) -> Record:
    phase, name, at_ns, number, tensors, rank = values
    return Record(phase, name, at_ns, number, tuple(Tensor(*tensor) for tensor in tensors), rank)
