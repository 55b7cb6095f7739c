"""What is installed. State: ``_installed``, set by :func:`install`, cleared by :func:`uninstall` and in a fork."""

from __future__ import annotations

import os
from collections.abc import Callable

from ..log import logger
from . import exitcode
from .ending import Rank, is_interactive
from .hooks import Hooks
from .signals import Signals

__all__ = ["act_on_pending", "install", "pending", "uninstall"]


class _Installed:
    """The watch over one rank."""

    def __init__(self, rank: Rank, is_pushing: Callable[[], bool]) -> None:
        self.rank = rank
        self.hooks, self.signals = Hooks(rank), Signals(rank, is_pushing)
        if not exitcode.watch(self.exits):
            logger.debug("exit codes cannot be seen in this Python: a rank that exits non-zero does not end the job")

    def remove(self) -> None:
        self.hooks.remove()
        self.signals.remove()
        exitcode.unwatch()

    def exits(self, code: object) -> None:
        """The interpreter is about to exit with ``code``, the argument of SystemExit."""
        status = exitcode.exit_status(code)
        if not status or not self.rank.is_here() or is_interactive():
            return
        words = "" if isinstance(code, int) else f": {code}"
        self.rank.end(
            status, "" if self.signals.is_ending else f"{self.rank} exits with code {status}{words}; the job ends\n"
        )


_installed: _Installed | None = None
_is_fork_hooked = False


def install(rank: int, size: int, abort: Callable[[int], None], is_pushing: Callable[[], bool]) -> None:
    """From now on, a failure of this rank ends the job through ``abort(exit_code)``. Nothing in a world of one.

    A signal that comes while ``is_pushing()`` is kept until :func:`act_on_pending`.
    """
    global _installed, _is_fork_hooked
    uninstall()
    if size == 1:
        return
    _installed = _Installed(Rank(rank, size, abort), is_pushing)
    if not _is_fork_hooked:
        os.register_at_fork(after_in_child=uninstall)
        _is_fork_hooked = True


def uninstall() -> None:
    """Put everything back as :func:`install` found it; also done in a forked child."""
    global _installed
    if _installed is not None:
        _installed.remove()
        _installed = None


def pending() -> bool:
    """Whether a signal has come during a push and waits."""
    return _installed is not None and _installed.signals.pending()


def act_on_pending() -> None:
    """Act on the signals that came during a push; may raise KeyboardInterrupt or SystemExit. Called after each push."""
    if _installed is not None:
        _installed.signals.act_on_pending()
