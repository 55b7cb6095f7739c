"""The timeline's two calls."""

from __future__ import annotations

import os

from . import runtime

__all__ = ["start_timeline", "stop_timeline"]


def start_timeline(file_path: str | os.PathLike[str], mark_cycles: bool = False) -> None:
    """Record what happens to every tensor on every rank, for a Chrome trace in ``file_path`` on rank 0's host.

    Call it on all ranks, or on rank 0 alone: the others then begin with the next thing that they hear from it. Nobody
    waits. ``mark_cycles`` also marks each round of the negotiation. ``MPIDDP_TIMELINE`` does the same from ``init()``.

    Raises OSError on rank 0 where the file cannot be written, ArgumentError where a timeline is being recorded.
    """
    runtime.current().timeline.start(os.fspath(file_path), mark_cycles)


def stop_timeline() -> None:
    """End the timeline. Call it on all ranks, or on rank 0 alone; without it the timeline ends with ``shutdown()``.

    Rank 0 returns when the file is complete. Of a rank that sends nothing for ``MPIDDP_EXIT_TIMEOUT_S`` it does without
    the part, and says so. Other ranks hand their parts over while they go on. Does nothing where nothing is recorded.
    """
    runtime.current().timeline.stop()
