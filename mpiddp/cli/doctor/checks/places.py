"""What is found on many nodes is one finding, with the nodes' names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from ..facts import Facts, Job
from ..finding import Finding, on_ranks

__all__ = ["each_node"]

_NAMES = 6


def each_node(job: Job, look: Callable[[list[Facts]], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of ``look`` on the ranks of each node, equal ones joined; where they hold is added to the text."""
    found: dict[Finding, list[list[Facts]]] = {}
    for ranks in job.nodes().values():
        for finding in look(ranks):
            found.setdefault(finding, []).append(ranks)
    for finding, nodes in found.items():
        yield dataclasses.replace(finding, what=f"{finding.what} ({_where(nodes)})")


def _where(nodes: list[list[Facts]]) -> str:
    if len(nodes) == 1:
        return f"{nodes[0][0].host}, {on_ranks(each.rank for each in nodes[0])}"
    hosts = [ranks[0].host for ranks in nodes]
    return ", ".join(hosts[:_NAMES]) + (f" and {len(hosts) - _NAMES} more nodes" if len(hosts) > _NAMES else "")
