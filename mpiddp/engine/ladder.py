"""The ladder of waiting: so many pushes at once, then giving the core away between pushes, then sleeps.

On one node what is waited for comes within the time in which a core is given away. Between hosts a segment may take
longer than that to arrive. Nothing is lost then by sleeping, as long as the sleeps are short beside the segment: MPI
moves bytes only when somebody pushes, and what comes meanwhile must fit the system's buffers. An all-reduce of 32 MiB
over 1 Gbit/s between 2 hosts took 3.1 s of CPU per GB while each piece was waited for anew by giving the core away for
1 ms and then sleeping for 0.2 ms at a time, and 0.9 with what is here, in the same time.
"""

from __future__ import annotations

import os
import time

import torch

from ..transport.doorbell import Doorbell

__all__ = ["AtTheDoor", "BetweenHosts", "Ladder", "ladder_for"]

#: So many pushes at once.
_SPINS = 2

#: For so long the core is given away between pushes. Between hosts nothing is worth a core for longer: with 1 ms 4 KiB
#: between 4 hosts took a fifth longer where the processor is slow, with 5 ms 32 MiB a fifth more of it.
_ON_A_NODE_S, _BETWEEN_HOSTS_S = 0.02, 0.003

#: What comes later than this, after its waiting began, comes from a link that is slow beside a core.
_SLOW_S = 0.0015

#: The least that is left of giving the core away where the link is slow.
_LEAST_S = 0.00003

#: The longer somebody has waited, the longer he may sleep at a time: he hears of the end too late by at most this part
#: of his waiting. 1 ms are 125 KB at 1 Gbit/s. With 0.5 ms at the most 32 MiB took an eighth more of the CPU; with 2 ms
#: they took longer.
_SLEEP_S, _SLEEP_PART, _LONGEST_SLEEP_S = 0.0002, 1 / 64, 0.001


class Ladder:
    """One wait, for the ranks of this node. ``spins``: so many pushes come before a rest."""

    __slots__ = ("_idle_since_s", "spins")

    def __init__(self) -> None:
        self.spins = _SPINS
        self._idle_since_s = 0.0

    def moved(self, now: float) -> None:
        """A push moved something."""
        if self._idle_since_s:
            self._rested(now - self._idle_since_s)
            self._idle_since_s = 0.0

    def rest(self, now: float) -> bool:
        """After pushes that moved nothing. True: as many of them are wanted again before the next rest."""
        self._idle_since_s = self._idle_since_s or now
        return self._rest(now, now - self._idle_since_s)

    def _rest(self, now: float, idle_s: float) -> bool:
        if idle_s < _ON_A_NODE_S:
            os.sched_yield()
        else:
            time.sleep(_SLEEP_S)
        return False

    def _rested(self, idle_s: float) -> None:
        """What was waited for came after so long."""


class BetweenHosts(Ladder):
    """One wait for ranks of this node and of others. The core is given away for a quarter as long the next time where
    the link is slow, and for twice as long where no sleep was needed."""

    __slots__ = ("_begun_s", "_has_slept", "_yield_s")

    def __init__(self, begun_s: float) -> None:
        super().__init__()
        self._begun_s = begun_s
        self._yield_s = _BETWEEN_HOSTS_S
        self._has_slept = False

    def _rest(self, now: float, idle_s: float) -> bool:
        if idle_s < self._yield_s:
            os.sched_yield()
        else:
            self._has_slept = True
            _sleep_after(now - self._begun_s)
        return False

    def _rested(self, idle_s: float) -> None:
        if not self._has_slept:
            self._yield_s = min(_BETWEEN_HOSTS_S, 2 * self._yield_s)
        elif idle_s > _SLOW_S:
            self._yield_s = max(_LEAST_S, self._yield_s / 4)
        self._has_slept = False


class AtTheDoor(Ladder):
    """One wait where all others are on other hosts, and MPI's sockets say when something comes.

    4 KiB between 4 hosts took 1.2 ms in place of 1.45 and half of the CPU, 1 MiB between 2 hosts 3.1 s of CPU per GB in
    place of 8.3. Where a long message comes slowly it would ring for every packet: then plain sleeps collect some.
    """

    __slots__ = ("_begun_s", "_bell", "_has_slept", "_is_slow")

    def __init__(self, begun_s: float, bell: Doorbell) -> None:
        super().__init__()
        self._begun_s, self._bell = begun_s, bell
        self._is_slow = self._has_slept = False

    def _rest(self, now: float, idle_s: float) -> bool:
        if self._is_slow or idle_s > _BETWEEN_HOSTS_S:
            self._has_slept = True
            _sleep_after(now - self._begun_s)
            return False
        self._bell.wait(_LONGEST_SLEEP_S)
        return True  # what MPI takes in while a push asks for something else, only the next push finds

    def _rested(self, idle_s: float) -> None:
        if not self._has_slept:
            self._bell.came()
        self._is_slow, self._has_slept = idle_s > _SLOW_S, False
        self.spins = 1 if self._is_slow else _SPINS


def _sleep_after(waited_s: float) -> None:
    time.sleep(min(_LONGEST_SLEEP_S, max(_SLEEP_S, waited_s * _SLEEP_PART)))


def ladder_for(begun_s: float, is_between_hosts: bool, bell: Doorbell | None) -> Ladder:
    """For one wait. Work on a GPU rings no bell."""
    if not is_between_hosts:
        return Ladder()
    if bell is None or not bell.is_trusted or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return BetweenHosts(begun_s)
    return AtTheDoor(begun_s, bell)
