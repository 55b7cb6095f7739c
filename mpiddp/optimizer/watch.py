"""How much of the exchange of gradients is hidden behind backward."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..engine import Lane
from ..transport.base import Link, Steps
from .wrapped import Wrapped

__all__ = ["ExchangeReport", "covered", "watch_exchange"]


class ExchangeReport:
    """What has been observed since :func:`watch_exchange`, on this rank; ``str()`` of it is a line to print.

    ``steps``: exchanges of gradients; ``under_way_s``: seconds in which at least one bucket was under way, that is from
    its launch until its result was there; ``waited_s``: the part of them in which backward had ended and waited. The
    first step is not counted: in it the ranks come together and agree on what the buckets are.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.under_way_s = self.waited_s = 0.0
        self._turns = list[tuple[float, int]]()  # when a bucket left (1) and when it was there (-1)
        self._done_cycle: int | None = None  # the lane's number of the last exchange

    @property
    def hidden(self) -> float | None:
        """The part of the time under way in which backward went on, 0 to 1; None if nothing was exchanged."""
        return max(0.0, 1.0 - self.waited_s / self.under_way_s) if self.under_way_s > 0 else None

    def observe(self, lane: Lane, start: Callable[[Link, int], Steps]) -> Callable[[Link, int], Steps]:
        """``start``, with the time from now to its end; what follows the gradients' buckets is left as it is."""
        if self._done_cycle is None or not lane.is_in_cycle or lane.cycle == self._done_cycle:
            return start
        self._turns.append((time.perf_counter(), 1))

        def observed(link: Link, tag: int) -> Steps:
            yield from start(link, tag)
            self._turns.append((time.perf_counter(), -1))

        return observed

    @contextmanager
    def waiting(self, lane: Lane) -> Iterator[None]:
        """Backward has ended and waits for the buckets."""
        began = time.perf_counter()
        try:
            yield
        finally:
            ended = time.perf_counter()
            if self._done_cycle is not None:
                self.steps += 1
                self.under_way_s += covered(self._turns, ended)
                self.waited_s += ended - began
            self._done_cycle = lane.cycle
            self._turns.clear()

    def __str__(self) -> str:
        if self.hidden is None:
            return "no gradients were exchanged"
        under_way, waited = (seconds / self.steps * 1e3 for seconds in (self.under_way_s, self.waited_s))
        return (
            f"{100 * self.hidden:.0f} % of the exchange hidden behind backward: buckets under way for "
            f"{under_way:.2f} ms a step, {waited:.2f} of them after backward"
        )

    def __repr__(self) -> str:
        return f"ExchangeReport({self.steps} steps, {self.under_way_s:.3f} s under way, {self.waited_s:.3f} s waited)"


def covered(turns: list[tuple[float, int]], end_s: float) -> float:
    """Seconds in which at least one was under way: each begins with a (time, 1) and ends with a (time, -1), or at
    ``end_s``."""
    seconds, under_way, since = 0.0, 0, 0.0
    for at, turn in sorted(turns, key=lambda each: (each[0], -each[1])):
        if under_way == 0:
            since = at
        under_way += turn
        if under_way == 0:
            seconds += at - since
    return seconds + (end_s - since if under_way else 0.0)


def watch_exchange(optimizer: Any) -> ExchangeReport:
    """Observe from now on how much of the exchange of ``optimizer``, a DistributedOptimizer, backward hides.

    Costs two readings of the clock for each bucket, and nothing where it is not called. Nothing is observed where
    gradients are not exchanged in buckets during backward: with ``op=Adasum``, in a world of one, and on ranks outside
    the optimizer's process set. A second call begins anew. Raises TypeError for an optimizer that is not distributed.
    """
    if not isinstance(optimizer, Wrapped):
        raise TypeError(f"watch_exchange takes what DistributedOptimizer returned, not a {type(optimizer).__name__}")
    report = ExchangeReport()
    reducer = getattr(optimizer, "_mpiddp_reducer", None)
    if reducer is not None and reducer.lane.link.size > 1:
        reducer.lane.watch = report
    return report
