"""Child processes of a rank: DataLoader workers and the like. They know who their parent is; they may not communicate.

A forked child has the parent's memory and needs nothing. A child that is started anew (spawn, forkserver) finds the
parent's topology in a private environment variable. It counts only there: a plain subprocess (``python eval.py`` run
by a rank) is a world of its own, and so is whatever a launcher has started.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Mapping

from . import config, processes

__all__ = ["Topology", "inherited", "publish", "publish_signals", "withdraw"]

#: The rank's process id, then the fields of its Topology.
_VARIABLE = "_MPIDDP_WORLD"
#: The rank's process id, then the signals that it awaits.
_SIGNALS = "_MPIDDP_SIGNALS"

#: Of the variables that a launcher gives to a process of its own, those that init() has taken away from its children's.
_LAUNCHED_ANEW = ("PMIX_RANK", "PMI_RANK", "PMI_FD", "PMI_PORT")


@dataclasses.dataclass(frozen=True)
class Topology:
    """Who a rank is: the answers of ``mpiddp.rank()`` and its kin."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int
    is_homogeneous: bool


def publish(topology: Topology) -> None:
    """Leave ``topology`` to the child processes that are started from now on."""
    numbers = (os.getpid(), *(int(value) for value in dataclasses.astuple(topology)))
    config.export({_VARIABLE: ",".join(map(str, numbers))})


def withdraw() -> None:
    """Children that are started from now on are told nothing."""
    config.remove([_VARIABLE])


def publish_signals(signals: Iterable[int]) -> None:
    """Child processes that are started from now on do not die of ``signals``: Slurm sends them to all of a step."""
    told = _signals(config.environ(), os.getpid())
    config.export({_SIGNALS: ",".join(map(str, map(int, (os.getpid(), *sorted({*told, *signals})))))})


def _signals(environ: Mapping[str, str], of_pid: int) -> list[int]:
    try:
        pid, *signals = (int(number) for number in environ.get(_SIGNALS, "").split(","))
    except ValueError:
        return []
    return signals if pid == of_pid else []


def _ignore_signals() -> None:
    """In a child that is started anew, where they are deadly by default: as early as this is imported."""
    if threading.current_thread() is not threading.main_thread() or _SIGNALS not in config.environ():
        return
    for number in _signals(config.environ(), _creator_pid() or 0):
        if number not in (signal.SIGTERM, signal.SIGINT) and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.SIG_IGN)


def inherited(environ: Mapping[str, str], creator_pid: int | None = None) -> Topology | None:
    """The topology of the rank whose multiprocessing child this is; None in any other process.

    ``creator_pid`` is the process that created this one through ``multiprocessing``: asked of it unless given.
    """
    if creator_pid is None:
        creator_pid = _creator_pid()
    if creator_pid is None or any(n in environ for n in _LAUNCHED_ANEW):
        return None
    try:
        pid, rank, size, local_rank, local_size, cross_rank, cross_size, homogeneous = (
            int(number) for number in environ.get(_VARIABLE, "").split(",")
        )
    except ValueError:
        return None
    if pid != creator_pid:
        return None
    return Topology(rank, size, local_rank, local_size, cross_rank, cross_size, bool(homogeneous))


def _creator_pid() -> int | None:
    creator = multiprocessing.parent_process()
    if creator is not None:
        return creator.pid
    process = multiprocessing.current_process()
    if not getattr(process, "_inheriting", False):
        return None
    # A new child runs the script's top level before it is told who created it: its parent, or the forkserver's
    # parent. The forkserver itself may run the top level, too; it is no child and keeps the name of a main process.
    is_of_forkserver = any("multiprocessing.forkserver" in word for word in sys.orig_argv)
    return processes.parent_pid(os.getppid()) if is_of_forkserver and process.name != "MainProcess" else os.getppid()


_ignore_signals()
