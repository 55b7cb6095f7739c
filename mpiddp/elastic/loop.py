"""``run``: call the training function again after a failure, from the last commit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar, cast

from ..errors import CollectiveError
from ..log import logger
from .base import State
from .hosts import HostsUpdatedInterrupt
from .renewal import renew

__all__ = ["run"]

#: A failure that comes back so often, with no commit in between, has its cause in the script.
FAILURES_WITHOUT_A_COMMIT = 3
#: Failures in one run, whatever it commits: what fails again and again shall end at some time.
FAILURES = 100

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=State)


def run(func: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Decorate ``train(state, ...)``: when it fails it is called again, with the state as it was committed last.

    The state is synchronised (``state.sync()``), then the function is called; what it returns is returned. After a
    CollectiveError (HorovodInternalError), if all ranks have failed and all are there: ``state.restore()``, its reset
    callbacks, and again from the start. After a HostsUpdatedInterrupt the same without the restore. Errors of any other
    kind pass through.

    Raises the CollectiveError itself where it cannot be survived: a rank has left, the other ranks have not failed, or
    it is the third without a commit in between. To be called on all ranks.
    """

    @functools.wraps(func)
    def wrapped(state: S, *args: P.args, **kwargs: P.kwargs) -> R:
        attempts = _Attempts(state)
        must_sync = True
        while True:
            try:
                if must_sync:
                    state.sync()
                return func(state, *args, **kwargs)
            except CollectiveError as error:
                attempts.count(error)
                renew(state, error)
                state.restore()
                must_sync = True
            except HostsUpdatedInterrupt as interrupt:
                logger.info("%s: going on in the new world", interrupt)
                renew(state, None)
                must_sync = not interrupt.skip_sync
            state.on_reset()

    return cast("Callable[Concatenate[S, P], R]", wrapped)


class _Attempts:
    """Counts failures, so that none is tried for ever."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._failures = self._fruitless = 0
        self._commits = state.commits

    def count(self, error: CollectiveError) -> None:
        """Raise ``error`` if it is one too many."""
        self._failures += 1
        self._fruitless = 1 if self._state.commits > self._commits else self._fruitless + 1
        self._commits = self._state.commits
        if self._fruitless >= FAILURES_WITHOUT_A_COMMIT or self._failures >= FAILURES:
            logger.error("failure %d of an elastic run, the last %d without a commit", self._failures, self._fruitless)
            raise error
        logger.warning("failure %d of an elastic run, back to the last commit: %s", self._failures, error)
