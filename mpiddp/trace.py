"""One way to record what happens: spans and instants go to the sinks that listen, and cost a test when none does.

Spans appear in torch.profiler, too, while it is active in the thread where they begin.

State: ``_sinks``, a tuple replaced as a whole (never mutated) by :func:`add_sink` and :func:`remove_sink`, so that
readers need no lock.
"""

from __future__ import annotations

import itertools
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch.autograd.profiler as torch_profiler

__all__ = ["Event", "Sink", "active", "add_sink", "instant", "is_watched", "remove_sink", "span"]


class Event(NamedTuple):
    """Something that happened: ``phase`` is ``B`` (begin), ``E`` (end) or ``i`` (instant); times are ns of the
    monotonic clock.

    ``number`` is that of the span, 0 for an instant. A span may end in another thread than it began in, and spans of
    one thread need not be nested: an exchange is resumed by whoever pushes. ``args["of"]`` are the handles concerned.
    """

    phase: str
    name: str
    at_ns: int
    args: dict[str, Any]
    number: int = 0


class Sink(Protocol):
    """Whoever listens."""

    def __call__(self, event: Event, /) -> None: ...


_sinks: tuple[Sink, ...] = ()
_numbers = itertools.count(1)
_nothing = nullcontext()


def active() -> bool:
    """Whether anybody listens to instants."""
    return bool(_sinks)


def is_watched() -> bool:
    """Whether anybody listens to spans, torch's profiler among them."""
    return bool(_sinks) or bool(torch_profiler._is_profiler_enabled)


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
        _emit("i", what, args, 0)


def span(what: str, /, **args: Any) -> AbstractContextManager[None]:
    """Record the beginning and the end of a block."""
    if is_watched():
        return _Span(what, args)
    return _nothing


class _Span:
    """A span that somebody listens to."""

    __slots__ = ("_args", "_number", "_profiled", "_what")

    def __init__(self, what: str, args: dict[str, Any]) -> None:
        self._what, self._args, self._number = what, args, next(_numbers)
        self._profiled: Any = None

    def __enter__(self) -> None:
        if torch_profiler._is_profiler_enabled:
            named = f"mpiddp::{self._what} {self._args.get('name', '')}".rstrip()
            self._profiled = torch_profiler.record_function(named)
            self._profiled.__enter__()
        _emit("B", self._what, self._args, self._number)

    def __exit__(self, *exception: object) -> None:
        _emit("E", self._what, self._args, self._number)
        if self._profiled is not None:
            self._profiled.__exit__(None, None, None)


def _emit(phase: str, what: str, args: dict[str, Any], number: int) -> None:
    event = Event(phase, what, time.monotonic_ns(), args, number)
    for sink in _sinks:
        sink(event)
