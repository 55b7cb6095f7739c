"""The timeline: what every rank did with every tensor, as one Chrome trace (chrome://tracing, ui.perfetto.dev)."""

from .nvtx import mark_ranges
from .session import Timeline

__all__ = ["Timeline", "mark_ranges"]
