"""Spans as NVTX ranges, which Nsight Systems shows beside the GPU's kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .. import trace

__all__ = ["NvtxRanges", "mark_ranges"]

#: Nsight Systems sets it for the programs that it watches.
_WATCHED = "NSYS_PROFILING_SESSION_ID"

_marking: NvtxRanges | None = None


class NvtxRanges:
    """A sink. Ranges of the whole process, not of a thread: spans need not be nested, and may end in another thread."""

    def __init__(self, nvtx: Any) -> None:
        self._nvtx = nvtx
        self._open: dict[int, Any] = {}

    def __call__(self, event: trace.Event) -> None:
        if event.phase == "B":
            named = f"mpiddp::{event.name} {event.args.get('name', '')}".rstrip()
            self._open[event.number] = self._nvtx.range_start(named)
        elif event.phase == "E" and event.number in self._open:
            self._nvtx.range_end(self._open.pop(event.number))


def mark_ranges(environ: Mapping[str, str]) -> bool:
    """Mark ranges from now on, where there is a GPU and Nsight Systems watches; whether it does."""
    global _marking
    if _WATCHED not in environ or not torch.cuda.is_available():
        return False
    if _marking is None:
        _marking = NvtxRanges(torch.cuda.nvtx)
        trace.add_sink(_marking)
    return True
