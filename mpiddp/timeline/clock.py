"""How far a rank's monotonic clock is from rank 0's, by asking for the time and halving the way (Cristian, 1989)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Clock"]

#: More questions find a quicker way there and back, which bounds the error; this many find one of the quickest.
_QUESTIONS = 16


@dataclass
class Clock:
    """``shift_ns`` added to this rank's time gives rank 0's, within ``error_ns``: half of the quickest way and back."""

    shift_ns: int = 0
    error_ns: int = -1
    answers: int = 0

    @property
    def is_known(self) -> bool:
        """Whether enough answers have come."""
        return self.answers >= _QUESTIONS

    def answer(self, asked_ns: int, there_ns: int, came_ns: int) -> None:
        """Rank 0's clock said ``there_ns`` at some time between ``asked_ns`` and ``came_ns`` by this rank's clock."""
        error_ns = (came_ns - asked_ns + 1) // 2
        self.answers += 1
        if self.error_ns < 0 or error_ns < self.error_ns:
            self.error_ns = error_ns
            shift_ns = there_ns - (asked_ns + came_ns) // 2
            # On one host it is one clock: no shift is the likeliest one within the error.
            self.shift_ns = shift_ns if abs(shift_ns) > error_ns else 0
