"""Who has left a process set, and what that means for those who stay."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import RankLeftError
from .request import Request

__all__ = ["Departures"]


class Departures:
    """What a member has heard. ``ranks`` are the members' world ranks; the coordinator is the first."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.left: dict[int, tuple[int, list[int]]] = {}  # world rank -> its steps, what its lanes had launched
        self.everybody = False
        self.coordinator_gone = False
        self._ranks = ranks

    def lost_after(self, lane: int, number: int) -> RankLeftError | None:
        """The error of the ``number``th launch of a lane, if a member has left before it launched as many."""
        for rank, (steps, launched) in self.left.items():
            if number > (launched[lane] if lane < len(launched) else 0):
                return RankLeftError(
                    f"gradients: rank {rank} left after {steps} steps and will not take part; uneven data? see join()"
                )
        return None

    def without_coordinator(self, request: Request) -> RankLeftError:
        """The error of a request that nobody will ever schedule."""
        rank = self._ranks[0]
        when = f" after {self.left[rank][0]} steps" if rank in self.left else ""
        return RankLeftError(
            f"{request.name!r}: rank {rank} left{when} and will not take part; uneven data? see join()"
        )
