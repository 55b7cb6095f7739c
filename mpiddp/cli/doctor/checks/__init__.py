"""The checks: each a function from the facts of a job to findings. A new one is added to CHECKS."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..facts import Job
from ..finding import SEVERITIES, Finding
from . import gpu, job, network, node

__all__ = ["CHECKS", "findings"]

CHECKS: tuple[Callable[[Job], Iterator[Finding]], ...] = (*job.CHECKS, *node.CHECKS, *network.CHECKS, *gpu.CHECKS)


def findings(examined: Job) -> list[Finding]:
    """Everything that the checks find, the worst first."""
    found = [finding for check in CHECKS for finding in check(examined)]
    return sorted(found, key=lambda finding: -SEVERITIES.index(finding.severity))
