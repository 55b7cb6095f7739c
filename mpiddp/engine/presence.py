"""What each rank says of itself in a page of memory that the ranks of its node share, for when others wait for it.

Each rank writes its own record and nobody else's, in a microsecond and without a system call. A reader may see a
record that is half new: it is shown to people, and decides nothing but what they are told.
"""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..memory.shared import HEADER_NBYTES, share
from . import stack
from .request import Key, automatic_name
from .stack import start_time

__all__ = ["COMPUTING", "LEFT", "WAITING", "Presence", "Seen", "lane_key"]

COMPUTING, WAITING, LEFT = range(3)  # phases

_RECORD_NBYTES = 512
_WORDS = _RECORD_NBYTES // 8
# Words of a record. PUSHED_S is negative during a push: then it is when the push before ended.
_PID, _STARTED, _PHASE, _PUSHED_S, _STEP, _STALLED, _SIGNAL, _STACKS_FD, _SINCE_S, _REPORTED = range(10)
_LANES = 10  # pairs: the lane's key, and how many exchanges this rank has launched in it
_MOST_LANES = 10
_NOWHERE = _WORDS - 1
_SUBMITTED = 32  # from here: count, time, length of the name, name
_NAME_NBYTES = (_NOWHERE - _SUBMITTED - 3) * 8
_submission = struct.Struct(f"qdq{_NAME_NBYTES}s")
_three = struct.Struct("qqq")
_unnamed, _UNNAMED = struct.Struct("qdqqqq"), -1  # in place of the length; then kind, number, place in a group or -1


@dataclass(frozen=True)
class Seen:
    """A record, as a peer sees it. Times are those of ``time.monotonic()``, which is one clock on a node."""

    rank: int
    pid: int
    is_alive: bool
    phase: int
    in_push: bool
    pushed_s: float
    since_s: float
    submitted: int
    submitted_s: float
    name: str
    step: int
    stalled: int
    reported: int
    signal: int
    stacks_fd: int
    lanes: Mapping[int, int]


class Presence:
    """The page, and this rank's record in it. ``ranks`` are the world ranks of the node, in the order of the
    records."""

    def __init__(self, memory: Any, ranks: Sequence[int], rank: int) -> None:
        self.ranks = list(ranks)
        self._memory = memory
        whole = memoryview(memory)[HEADER_NBYTES:]
        self._words, self._times = whole.cast("q"), whole.cast("d")
        self._whole = whole
        at = self.ranks.index(rank) * _WORDS
        self.words = self._words[at : at + _WORDS]
        self.times = self._times[at : at + _WORDS]
        self.rank = rank
        self._name_at = HEADER_NBYTES + (at + _SUBMITTED) * 8
        self._count = 0
        self._lane_count = 0
        self.words[_PID], self.words[_STARTED] = os.getpid(), start_time(os.getpid())

    @classmethod
    def alone(cls, rank: int = 0) -> Presence:
        """A page that nobody else sees."""
        return cls(bytearray(HEADER_NBYTES + _RECORD_NBYTES), [rank], rank)

    @classmethod
    def on_node(cls, node_comm: Any, rank: int) -> Presence:
        """The page of the node's ranks. Collective over ``node_comm``; a page of one's own where none can be shared."""
        ranks = node_comm.allgather(rank)
        memory = share(node_comm, HEADER_NBYTES + _RECORD_NBYTES * len(ranks))
        presence = cls(memory, ranks, rank) if memory is not None else cls.alone(rank)
        stacks = stack.install() if len(presence.ranks) > 1 else None
        if stacks is not None:
            presence.words[_SIGNAL], presence.words[_STACKS_FD] = stacks
        return presence

    # -- written in the hot path ---------------------------------------------------------------------------------------

    def submitted(self, key: Key, kind: int, now: float) -> None:
        """An operation was submitted."""
        self._count = count = self._count + 1
        if isinstance(key, str):
            encoded = key.encode(errors="replace")
            _submission.pack_into(self._memory, self._name_at, count, now, len(encoded), encoded)
        else:
            number, place = (key, -1) if isinstance(key, int) else key
            _unnamed.pack_into(self._memory, self._name_at, count, now, _UNNAMED, kind, number, place)

    def push_begins(self) -> None:
        """A push has begun."""
        self.times[_PUSHED_S] = -self.times[_PUSHED_S]

    def push_ends(self, now: float) -> None:
        """The push has ended."""
        self.times[_PUSHED_S] = now

    def phase(self, phase: int, now: float) -> None:
        """What this rank does from now on."""
        self.words[_PHASE] = phase
        self.times[_SINCE_S] = now

    def lane(self, key: int) -> int:
        """Where to write how many exchanges were launched in a lane, in :attr:`words`; nowhere if there are too
        many."""
        if self._lane_count == _MOST_LANES:
            return _NOWHERE
        at = _LANES + 2 * self._lane_count
        self._lane_count += 1
        self.words[at] = key
        return at + 1

    def step(self, number: int) -> None:
        """An optimizer's step has begun."""
        self.words[_STEP] = number

    # -- written seldom ------------------------------------------------------------------------------------------------

    def stalled(self, what: int, reported: int) -> None:
        """This rank waits for too long, for what has this fingerprint, or has reported that; 0: nothing."""
        self.words[_STALLED], self.words[_REPORTED] = what, reported

    def close(self) -> None:
        """This rank has left; peers ask it for no stack any more."""
        self.phase(LEFT, time.monotonic())
        if self.words[_SIGNAL]:
            self.words[_SIGNAL] = 0
            stack.uninstall()

    # -- read ----------------------------------------------------------------------------------------------------------

    def see(self, rank: int) -> Seen | None:
        """The record of a world rank; None where it is on another node, or cannot be seen."""
        if rank not in self.ranks:
            return None
        at = self.ranks.index(rank) * _WORDS
        words, times = self._words[at : at + _WORDS].tolist(), self._times[at : at + _WORDS].tolist()
        count, submitted_s, length, name = _submission.unpack_from(self._memory, HEADER_NBYTES + (at + _SUBMITTED) * 8)
        return Seen(
            rank=rank,
            pid=words[_PID],
            is_alive=start_time(words[_PID]) == words[_STARTED],
            phase=words[_PHASE],
            in_push=times[_PUSHED_S] < 0,
            pushed_s=abs(times[_PUSHED_S]),
            since_s=times[_SINCE_S],
            submitted=count,
            submitted_s=submitted_s,
            name=_text(name, length) if length != _UNNAMED else _name_of(*_three.unpack_from(name)),
            step=words[_STEP],
            stalled=words[_STALLED],
            reported=words[_REPORTED],
            signal=words[_SIGNAL],
            stacks_fd=words[_STACKS_FD],
            lanes={words[i]: words[i + 1] for i in range(_LANES, _LANES + 2 * _MOST_LANES, 2) if words[i]},
        )

    def __repr__(self) -> str:
        return f"Presence(rank {self.rank} among {self.ranks})"


def lane_key(ranks: Sequence[int], number: int) -> int:
    """The same number on all members for a lane of a process set, and hardly ever for two."""
    return zlib.crc32(repr((tuple(ranks), number)).encode()) + 1


def _name_of(kind: int, number: int, place: int) -> str:
    return automatic_name(kind, number if place < 0 else (number, place))


def _text(encoded: bytes, nbytes: int) -> str:
    """A name, cut where it was too long."""
    if nbytes <= len(encoded):
        return encoded[:nbytes].decode(errors="replace")
    return encoded.decode(errors="ignore") + "..."
