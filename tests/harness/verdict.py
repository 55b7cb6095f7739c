"""Pure: from the records of all ranks of one test to its verdict: who failed, and who only because another left."""

from __future__ import annotations

import dataclasses
import re
import signal
from collections.abc import Mapping, Sequence

__all__ = ["RankRecord", "Verdict", "death", "judge"]


@dataclasses.dataclass(frozen=True)
class RankRecord:
    """What one rank did with one test. ``secondary``: its failure says only that another rank left or is missing."""

    rank: int
    outcome: str  # "passed", "failed", "skipped", "xfailed", "xpassed", "unfinished", "not begun"
    secondary: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.outcome}{' (because another rank left)' if self.secondary else ''}"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """``rank`` is whose reports are shown (None: no rank has any that count); ``problem`` says what is wrong."""

    rank: int | None
    problem: str | None
    summary: str


def judge(records: Sequence[RankRecord], ended: str | None = None, timed_out_s: float | None = None) -> Verdict:
    """The verdict on one test.

    ``ended`` tells how a rank or the job died, where known; ``timed_out_s`` is set when the parent had to end the job.
    The lowest rank that truly failed comes first, then a death, then those that failed because of another, then a hang.
    """
    size = len(records)
    summary = "\n".join(str(r) for r in records)
    failed = [r for r in records if r.outcome == "failed"]
    unfinished = [r.rank for r in records if r.outcome in ("unfinished", "not begun")]
    true_failures = [r for r in failed if not r.secondary]
    if true_failures or (failed and not (unfinished and ended)):
        rank = (true_failures or failed)[0].rank
        return Verdict(rank, f"rank {rank} of {size} failed", summary)
    if unfinished and timed_out_s is not None:
        return Verdict(None, f"{ranks(unfinished)} of {size} did not end within {timed_out_s:g} s", summary)
    if unfinished:
        return Verdict(None, ended or f"the job ended before {ranks(unfinished)} of {size} did", summary)
    if len({r.outcome for r in records} - {"xfailed", "xpassed"}) > 1:
        return Verdict(None, "the ranks disagree: " + ", ".join(map(str, records)), summary)
    return Verdict(0, None, summary)


def ranks(numbers: Sequence[int]) -> str:
    """'rank 1', or 'ranks 0, 2'."""
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def death(output: str, pids: Mapping[int, int]) -> str | None:
    """How a rank died, as the launcher tells it: "rank 1 died by signal 9 (SIGKILL)"; None if it says nothing.

    ``pids`` maps process ids to ranks: MPICH names the process only.
    """
    match = re.search(r"process rank (\d+) with PID \d+ on node \S+\s+exited\s+on\s+signal (\d+)", output)
    if match:
        return f"rank {match[1]} died by {signal_name(int(match[2]))}"
    match = re.search(r"Process name:\s+\[.*,(\d+)\]\s+Exit code:\s+(\d+)", output)
    if match:
        return f"rank {match[1]} exited with code {match[2]}"
    match = re.search(r"PID (\d+) RUNNING AT .*\n=\s+EXIT CODE: (\d+)", output)
    if match and int(match[1]) in pids:
        by_signal = re.search(r"EXIT STRING: .*\(signal (\d+)\)", output)
        how = f"died by {signal_name(int(by_signal[1]))}" if by_signal else f"exited with code {match[2]}"
        return f"rank {pids[int(match[1])]} {how}"
    return None


def signal_name(number: int) -> str:
    """'signal 9 (SIGKILL)'."""
    known = {s.value: s.name for s in signal.Signals}
    return f"signal {number} ({known[number]})" if number in known else f"signal {number}"
