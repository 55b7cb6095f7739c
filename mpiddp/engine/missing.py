"""The words of a stall report: what waits, who is missing, and what the missing ranks are doing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import stack
from .presence import LEFT, WAITING, Presence, Seen, lane_key

if TYPE_CHECKING:
    from .stall import Stall

__all__ = ["report"]

#: Stacks are asked of so many ranks; each may take a second.
_MOST_STACKS = 4
#: A rank that has pushed within this time is at work on what is in flight.
_RECENT_S = 1.0


def report(stall: Stall, presence: Presence, now: float) -> str:
    """The whole text: a line, and one for each missing rank, with its stack where it is on this node."""
    absent, elsewhere = _absent(stall, presence, now)
    waited = f"waited {stall.waited_s:.{stall.waited_s < 10:d}f} s for {stall.what()}{_set(stall)}"
    lines = [f"{waited}: {_who(stall, absent, elsewhere)}"]
    for number, rank in enumerate(absent):
        seen = presence.see(rank)
        if seen is None:
            lines.append(f"  rank {rank} {_unseen(stall, rank)}, on another host: its own log may tell more")
            continue
        lines.append(f"  rank {rank} {_state(stall, seen, now)}")
        if number < _MOST_STACKS and seen.is_alive:
            lines += _stack(presence, seen)
    return "\n".join(lines)


def _absent(stall: Stall, presence: Presence, now: float) -> tuple[list[int], list[int]]:
    """Who is missing, and which ranks cannot be seen from here where that does not tell."""
    if stall.absent is not None:
        return stall.absent, []
    others = [rank for rank in stall.channel.ranks if rank != presence.rank]
    absent = []
    for rank in others:
        seen = presence.see(rank)
        if seen is not None and rank not in stall.waiting and _holds_up(stall, seen, now):
            absent.append(rank)
    if not stall.is_announced and stall.channel.ranks[0] not in absent:
        absent.insert(0, stall.channel.ranks[0])
    elsewhere = [rank for rank in others if presence.see(rank) is None]
    return absent, elsewhere if not absent else []


def _holds_up(stall: Stall, seen: Seen, now: float) -> bool:
    if not seen.is_alive or seen.phase == LEFT:
        return True
    if stall.lane >= 0 and seen.lanes.get(lane_key(stall.channel.ranks, stall.lane), stall.number) < stall.number:
        return True
    return now - seen.pushed_s > _RECENT_S


def _set(stall: Stall) -> str:
    ranks = stall.channel.ranks
    return "" if stall.in_world else f" in the process set of ranks {_listed(ranks)}"


def _who(stall: Stall, absent: Sequence[int], elsewhere: Sequence[int]) -> str:
    waiting = f"{_ranks(stall.waiting)} {'wait' if len(stall.waiting) != 1 else 'waits'}" if stall.waiting else ""
    if absent:
        are = "are" if len(absent) > 1 else "is"
        said = f"{_ranks(absent)} {are} missing"
    elif elsewhere:
        said = f"nobody on this node is missing; of {_ranks(elsewhere)} on other hosts nothing is known here"
    else:
        said = "every rank takes part; the connection may be slow or broken"
    return ", ".join(filter(None, (said, waiting)))


def _unseen(stall: Stall, rank: int) -> str:
    if stall.is_announced and stall.absent is not None:
        return "has not submitted it, or does not push"
    return "coordinates this and has said nothing: it does not push"


def _state(stall: Stall, seen: Seen, now: float) -> str:
    if not seen.is_alive:
        return f"has exited (process {seen.pid} is gone)"
    if seen.phase == LEFT:
        return "has shut down"
    return f"{_part(stall, seen, now)}; {_doing(seen, now)}; {_history(seen, now)}"


def _part(stall: Stall, seen: Seen, now: float) -> str:
    """How far this rank has come with what the others wait for."""
    if stall.lane >= 0:
        launched = seen.lanes.get(lane_key(stall.channel.ranks, stall.lane))
        if launched is not None and launched < stall.number:
            behind = f"{launched} of the {stall.number} exchanges that the others have"
            return f"has launched {behind}, in its step {seen.step}"
    if stall.absent is None and stall.is_announced:
        return f"takes part but has not pushed for {now - seen.pushed_s:.0f} s"
    if seen.submitted_s > seen.pushed_s:
        return f"has submitted {seen.name!r} and has not pushed since"
    if stall.is_announced or now - seen.pushed_s < _RECENT_S:
        return "has not submitted it"
    if seen.rank == stall.channel.ranks[0]:
        return "coordinates this and does not push"
    return "does not wait for it either"


def _doing(seen: Seen, now: float) -> str:
    if seen.in_push:
        return f"in a push that has not ended since {now - seen.pushed_s:.0f} s ago"
    doing = f"waiting for {now - seen.since_s:.0f} s" if seen.phase == WAITING else "computing"
    return f"{doing}, last push {now - seen.pushed_s:.0f} s ago" if seen.pushed_s else f"{doing}, no push yet"


def _history(seen: Seen, now: float) -> str:
    if not seen.submitted:
        said = "nothing submitted yet"
    else:
        operations = "operation" if seen.submitted == 1 else "operations"
        said = f"{seen.submitted} {operations} submitted, the last {seen.name!r} {now - seen.submitted_s:.0f} s ago"
    return f"{said}; optimizer step {seen.step}" if seen.step else said


def _stack(presence: Presence, seen: Seen) -> list[str]:
    lines = stack.of_main_thread() if seen.rank == presence.rank else stack.of_peer(seen)
    return [f"    {line}" for line in lines] if lines else ["    (its stack cannot be had)"]


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {_listed(ranks)}"


def _listed(ranks: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(lo) if lo == hi else f"{lo}-{hi}" for lo, hi in runs)
