"""A finding: something that a user should know, and its cure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["ERROR", "NOTE", "SEVERITIES", "WARNING", "Finding", "error", "exit_code", "note", "on_ranks", "warning"]

NOTE, WARNING, ERROR = "note", "warning", "error"

#: In this order; the index is the exit code that a finding asks for.
SEVERITIES = (NOTE, WARNING, ERROR)


@dataclass(frozen=True)
class Finding:
    """``what`` is wrong, in one sentence; ``cure``: what to do. ``name`` is short and stays the same, for scripts."""

    severity: str
    name: str
    what: str
    cure: str


def note(name: str, what: str, cure: str = "") -> Finding:
    """Worth knowing; nothing is wrong."""
    return Finding(NOTE, name, what, cure)


def warning(name: str, what: str, cure: str) -> Finding:
    """It works, slower or less safely than it could."""
    return Finding(WARNING, name, what, cure)


def error(name: str, what: str, cure: str) -> Finding:
    """It does not work, or gives wrong results."""
    return Finding(ERROR, name, what, cure)


def exit_code(findings: Iterable[Finding]) -> int:
    """0: nothing, or notes; 1: warnings; 2: errors."""
    return max((SEVERITIES.index(finding.severity) for finding in findings), default=0)


def on_ranks(ranks: Iterable[int]) -> str:
    """``on rank 3``, ``on ranks 0, 1 and 5 more``."""
    numbers = sorted(ranks)
    shown, more = ", ".join(map(str, numbers[:6])), len(numbers) - 6
    return f"on rank{'s' * (len(numbers) > 1)} {shown}{f' and {more} more' if more > 0 else ''}"
