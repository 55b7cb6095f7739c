"""How large a staging buffer is: whether what is staged stays in the caches, or goes by way of memory. Pure.

Where the cores share their last cache, a small buffer that is used over and over is the fastest way: 32 MiB take 1.1 of
the time of ``x.add_(y)`` at 2 ranks. Where they do not, each block is written to lines that the other core's cache
holds, and read from there: 2.7. There a buffer so large that what is staged has gone to memory, and out of the reader's
cache, before it is written again takes 2.0 (in the former case 1.7). A virtual machine's cores may come to lie either
way, for seconds or minutes each; so each rank looks at how long its own copies take.
"""

from __future__ import annotations

__all__ = ["DEEP_NBYTES", "SHALLOW_NBYTES", "Depth"]

#: So far a rank may be ahead of its peers.
SHALLOW_NBYTES, DEEP_NBYTES = 1 << 20, 16 << 20

#: The other depth is tried once in so many exchanges, from the shallow and from the deep one. That the cores share a
#: cache again must be tried; that they do not any more is seen by what a shallow buffer costs.
_TRIES = 128, 16


class Depth:
    """What this rank has found out. :meth:`choose` before an exchange that fills a shallow buffer several times,
    :meth:`note` what a byte cost in it."""

    __slots__ = ("_costs", "_since")

    def __init__(self) -> None:
        self._costs: dict[int, float] = {}
        self._since = 0  # exchanges since the other depth was tried

    def choose(self) -> int:
        """The depth for the next exchange, in bytes."""
        best = self.best
        is_shallow = best == SHALLOW_NBYTES
        other = DEEP_NBYTES if is_shallow else SHALLOW_NBYTES
        self._since += 1
        if (self._costs and other not in self._costs) or self._since >= _TRIES[not is_shallow]:
            self._since = 0
            return other
        return best

    @property
    def best(self) -> int:
        """That which costs least, as far as is known."""
        return min(self._costs, key=self._costs.__getitem__, default=SHALLOW_NBYTES)

    def note(self, depth: int, cost: float) -> None:
        """What it cost to stage a byte at this depth, in any unit."""
        self._costs[depth] = cost

    def __repr__(self) -> str:
        known = ", ".join(f"{depth >> 20}: {cost:.3g}" for depth, cost in sorted(self._costs.items()))
        return f"Depth({self.best >> 20} MiB; {known or 'nothing known'})"
