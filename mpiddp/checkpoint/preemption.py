"""The signal that announces the end of a job: noted when it comes, agreed on by all ranks between two steps."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from .. import runtime, worker
from ..engine import Handle
from ..log import logger
from ..ops import Max, allreduce_async_, synchronize

__all__ = ["Agreement", "Notice", "held", "unheard"]

_counter = itertools.count()

#: The ranks ask each other for signals about so often. Slurm announces the end a minute early or more, and two ranks on
#: two cores spent 0.2 ms on it (which was 1% of a step of 8 ms when they asked at every one).
INTERVAL_S = 0.5

#: What would end a rank in the midst of a checkpoint, and can wait until it is written.
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


#: The signals that were awaited and have come: one answer for all Notices, since they announce the process's own end.
_came: set[int] = set()
#: The process that awaits them.
_owner = 0


class Notice:
    """Notes that one of ``signals`` has come, from now on; what they did before is not done any more.

    A signal that any Notice of this process has noted has come for all of them, however many there are. In its workers
    (a DataLoader's) TERM and INT end the worker, and others do nothing.
    """

    def __init__(self, signals: Iterable[signal.Signals]) -> None:
        global _owner
        self.signals = tuple(signals)
        if not self.signals:
            return
        if threading.current_thread() is not threading.main_thread():
            names = ", ".join(number.name for number in self.signals)
            logger.warning("Checkpoints was made outside the main thread, where %s cannot be awaited", names)
            return
        _owner = os.getpid()
        worker.publish_signals(self.signals)
        for number in self.signals:
            signal.signal(number, _receive)

    @property
    def has_come(self) -> bool:
        """Whether one of them has come."""
        return not _came.isdisjoint(self.signals)


def _receive(number: int, frame: FrameType | None) -> None:
    if os.getpid() == _owner:
        _came.add(number)
    elif number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    # Any other one is meant for the rank: Slurm signals every process of a step, and workers must not die of it.


class Agreement:
    """Whether any rank's flag is up, known to all ranks at the same step, without waiting for each other.

    A call starts the exchange of the flags (an all-reduce of 16 bytes), and the next call takes its answer: it has had
    a training step's time. ``every``: each so many-th call starts one; None: as many lie between as take half a second
    on the fastest rank, which is agreed on in the same exchange.
    """

    def __init__(self, every: int | None) -> None:
        self.every = every
        self._name = f"checkpoint.{next(_counter)}.preempted"
        self._wait = every or 1  # calls from one exchange to the next, alike on all ranks
        self._calls = 0  # since the last exchange
        self._started = 0.0
        self._handle: Handle | None = None
        self._decided = False

    def any(self, flag: bool) -> bool:
        """To be called on all ranks equally often; once true it stays so."""
        if runtime.size() == 1 or self._decided:
            return flag or self._decided
        if self._handle is not None:
            decided, wait = synchronize(self._handle).tolist()
            self._handle, self._decided = None, bool(decided)
            self._wait = self.every or -wait
        self._calls += 1
        if self._calls >= self._wait and not self._decided:
            said = torch.tensor([int(flag), -self._proposal()], device="cpu")
            self._handle = allreduce_async_(said, op=Max, name=self._name)
            self._calls = 0
        return self._decided

    def _proposal(self) -> int:
        """The calls that would have taken half a second; at most twice as many as now, since steps differ."""
        now = time.monotonic()
        seconds, self._started = now - self._started, now
        return max(1, min(2 * self._calls, int(self._calls * INTERVAL_S / max(seconds, 1e-6))))


@contextlib.contextmanager
def held(then_ignored: bool = False) -> Iterator[None]:
    """Signals that would end the rank wait until the body is done; they are then acted on as they would have been.

    ``then_ignored``: neither they nor later ones are acted on any more, since the rank is about to end by itself.
    Handlers that were set from C stay, and act at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    previous = _handlers(_ENDING)
    for number in previous:
        signal.signal(number, lambda number, frame: came.append(number))
    is_done = False
    try:
        yield
        is_done = True
    finally:
        silent = then_ignored and is_done
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_IGN if silent else handler)
        for each in dict.fromkeys([] if silent else came):
            os.kill(os.getpid(), each)


@contextlib.contextmanager
def unheard(signals: Iterable[int]) -> Iterator[None]:
    """Neither this process nor programs that the body starts hear ``signals`` or those that would end a rank.

    Slurm sends them to all processes of a step, and one that has a handler here is deadly again in a new program. What
    is ignored stays so, in shells too, which unblock what is blocked. That is left for handlers that were set from C,
    and for threads, which can set none.
    """
    numbers = {*_ENDING, *signals}
    is_main = threading.current_thread() is threading.main_thread()
    previous = _handlers(numbers) if is_main else {}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers - set(previous))
    for number in previous:
        signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _handlers(numbers: Iterable[int]) -> dict[int, Any]:
    """What is done at each signal, but for those that are ignored and those that are not Python's."""
    caught, found = _caught(), {}
    for number in numbers:
        handler = signal.getsignal(number)
        is_of_c = handler is None or (handler == signal.SIG_DFL and caught >> (number - 1) & 1)
        if not is_of_c and handler != signal.SIG_IGN:
            found[number] = handler
    return found


def _caught() -> int:
    """A mask of the signals that have a handler, whoever has set it: Python does not know of those set from C later
    (faulthandler.register(), a profiler), and could not put them back. 0 where /proc does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(errors="replace").splitlines():
            if line.startswith("SigCgt:"):
                return int(line.split()[1], 16)
    return 0
