"""raise_together: one rank's problem becomes an error on every rank, so that none is left waiting in a collective."""

from __future__ import annotations

import torch

from ..errors import MismatchError
from ..ops import Max, allreduce
from .objects import allgather_object

__all__ = ["raise_together"]

# Enough to see the pattern; a thousand ranks with one wrong checkpoint should not fill the screen.
PROBLEMS_SHOWN = 4


def raise_together(what: str, problem: str | None) -> None:
    """Return if no rank has a problem; else raise MismatchError on every rank, saying which rank has which.

    One all-reduce of 4 bytes in the good case.
    """
    bad = torch.tensor([int(problem is not None)], dtype=torch.int32, device="cpu")
    if not int(allreduce(bad, op=Max, name=f"{what}.problem")):
        return
    problems = allgather_object(problem, name=f"{what}.problems")
    named = [f"rank {rank}: {text}" for rank, text in enumerate(problems) if text is not None]
    more = len(named) - PROBLEMS_SHOWN
    raise MismatchError(f"{what}: {'; '.join(named[:PROBLEMS_SHOWN])}{f'; and {more} more ranks' if more > 0 else ''}")
