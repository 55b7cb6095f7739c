"""The one way in which anything is timed here: everybody in turn, block by block, call by call, medians.

Whoever is compared runs in the same minutes on the same cores: a round times one block of each, in an order that moves
on by one every round, so that nobody always follows the same other. What a block needs is made before its clock starts,
and all ranks start it together. Each call of a block is timed by itself, so that the median is one of calls: with as
many ranks as cores, whoever hands over to threads now and then waits for milliseconds, and a block's time would be made
of that. The mean tells of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["LEAST_ROUNDS", "Limits", "Timed", "Timing", "interleaved"]

#: Of a median of fewer little can be said, so that the time limit does not cut below it.
LEAST_ROUNDS = 5


@dataclass(frozen=True)
class Timed:
    """``block()`` makes ready and returns the calls that are then timed. ``tells_time``: each call returns its seconds
    itself, since what is timed runs elsewhere."""

    name: str
    block: Callable[[], Sequence[Callable[[], Any]]]
    tells_time: bool = False


@dataclass(frozen=True)
class Limits:
    """Rounds at the most, and seconds after which no further one begins (but never fewer than LEAST_ROUNDS)."""

    rounds: int
    seconds: float


@dataclass(frozen=True)
class Timing:
    """Seconds a call, on the rank where that is largest."""

    median: float
    mean: float


def interleaved(timed: Sequence[Timed], limits: Limits, comm: Any) -> dict[str, Timing]:
    """What one call of each takes, over all rounds. Collective on ``comm``.

    One round more than is counted: the first warms up.
    """
    times: dict[str, list[float]] = {each.name: [] for each in timed}
    began = time.perf_counter()
    for number in range(limits.rounds + 1):
        first = number % len(timed)
        for each in (*timed[first:], *timed[:first]):
            seconds = _block(each, comm)
            if number:
                times[each.name] += seconds
        elapsed = _largest(time.perf_counter() - began, comm)  # agreed, so that all stop together
        if elapsed > limits.seconds and number >= min(LEAST_ROUNDS, limits.rounds):
            break
    return {
        name: Timing(_largest(statistics.median(values), comm), _largest(statistics.fmean(values), comm))
        for name, values in times.items()
    }


def _largest(value: float, comm: Any) -> float:
    """Over the ranks of ``comm``."""
    return float(max(comm.allgather(value)))


def _block(each: Timed, comm: Any) -> list[float]:
    """Seconds of every call of one block but the first, which finds neither its code nor its peers where they are."""
    calls = each.block()
    seconds = []
    clock = time.perf_counter
    calls[0]()
    comm.Barrier()
    for call in calls[1:]:
        began = clock()
        told = call()
        seconds.append(told if each.tells_time else clock() - began)
    return seconds
