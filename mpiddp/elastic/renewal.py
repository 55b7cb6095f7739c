"""The one place where the world is made whole again, between a failure and the next attempt.

What can be survived is a failure that all ranks share and outlive: they meet here, end what is half done, and go on
with the communicators that they have. The death of a rank cannot: a world without it would be made here, from the ranks
that are left (and, after a HostsUpdatedInterrupt, one with those that have come).
"""

from __future__ import annotations

import torch

from .. import runtime
from ..errors import CollectiveError, RankLeftError
from ..ops import Max, allreduce_async_
from .base import State

__all__ = ["renew"]

#: So long a rank that has failed waits for the others to fail, too. They are at most a step apart.
MEETING_TIMEOUT_S = 60.0


def renew(state: State, error: CollectiveError | None) -> None:
    """Have a world in which training can go on, with nothing half done; raises ``error`` where that cannot be had.

    Collective: an all-reduce of one byte, and the rest of an exchange of gradients that a failure has cut short.
    """
    if error is None:
        return
    if isinstance(error, RankLeftError) or not runtime.is_initialized():
        raise error
    is_anybody_exchanging = _meet(not state.is_settled(), error)
    state.settle(is_anybody_exchanging)


def _meet(flag: bool, error: CollectiveError) -> bool:
    """Whether ``flag`` is true on any rank; raises unless all ranks come here in time."""
    if runtime.size() == 1:
        return flag
    engine = runtime.current().engine
    flags = torch.tensor([flag], device="cpu")
    handle = allreduce_async_(flags, op=Max, name="elastic.renew")
    if not engine.wait_until(lambda: handle.done, "the other ranks' failure", MEETING_TIMEOUT_S):
        raise CollectiveError(
            f"rank {runtime.rank()} failed, and within {MEETING_TIMEOUT_S:g} s not all of the others did: they cannot "
            f"go back together. The failure was: {error}"
        ) from error
    if handle.error is not None:
        raise error from handle.error
    return bool(flags.item())
