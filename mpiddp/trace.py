"""One way to record what happens: spans and instants go to the sinks that listen, and cost a test when none does.

State: ``_sinks``, a tuple replaced as a whole (never mutated) by :func:`add_sink` and :func:`remove_sink`, so that
readers need no lock.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

__all__ = ["Event", "Sink", "active", "add_sink", "instant", "remove_sink", "span"]


class Event(NamedTuple):
    """Something that happened: ``phase`` is ``B`` (begin), ``E`` (end) or ``i`` (instant); times are ns of the
    monotonic clock."""

    phase: str
    name: str
    at_ns: int
    args: dict[str, Any]


class Sink(Protocol):
    """Whoever listens."""

    def __call__(self, event: Event, /) -> None: ...


_sinks: tuple[Sink, ...] = ()


def active() -> bool:
    """Whether anybody listens."""
    return bool(_sinks)


def add_sink(sink: Sink) -> None:
    """From now on ``sink`` is called with every event, in the thread where it happens."""
    global _sinks
    _sinks = (*_sinks, sink)


def remove_sink(sink: Sink) -> None:
    """``sink`` is called no more."""
    global _sinks
    _sinks = tuple(s for s in _sinks if s is not sink)


def instant(what: str, /, **args: Any) -> None:
    """Record that something happened now."""
    if _sinks:
        _emit("i", what, args)


@contextmanager
def span(what: str, /, **args: Any) -> Iterator[None]:
    """Record the beginning and the end of a block."""
    if not _sinks:
        yield
        return
    _emit("B", what, args)
    try:
        yield
    finally:
        _emit("E", what, args)


def _emit(phase: str, what: str, args: dict[str, Any]) -> None:
    event = Event(phase, what, time.monotonic_ns(), args)
    for sink in _sinks:
        sink(event)
