"""Ranks in one process that share memory as those of a node do: each has segments of its own, and maps its peers'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mpiddp.memory.mapping import MemoryFiles
from mpiddp.memory.node import LOG_WORDS, NodeMemory
from mpiddp.transport.areas import Areas
from mpiddp.transport.base import Steps
from mpiddp.transport.node import MEETING_SLOTS, MEETINGS_AT, PAGE_NBYTES, Node
from tests.simulation import Network, SimulatedLink, run


def nodes(size: int, has_areas: bool = False) -> list[Node]:
    """The node as each of its ranks sees it; ``has_areas``: with a place for small tensors in each slot."""
    log = memoryview(bytearray(8 * LOG_WORDS * size)).cast("q")
    page = memoryview(bytearray(PAGE_NBYTES * size))
    memories = [NodeMemory(MemoryFiles(), log, rank, size) for rank in range(size)]
    members = [Node(page, range(size), rank, memory) for rank, memory in enumerate(memories)]
    if has_areas:
        *starts, end = Areas.bounds(MEETINGS_AT, MEETING_SLOTS)
        owned = [memory.segments.empty((end,), torch.uint8) for memory in memories]
        for member in members:
            member.areas = Areas(owned, starts)
    return members


class WatchedWords:
    """A node's words, of which every write is told to ``written``."""

    def __init__(self, words: memoryview, written: Callable[[], None]) -> None:
        self._words, self._written = words, written

    def __getitem__(self, at: int | slice) -> Any:
        return self._words[at]

    def __setitem__(self, at: int, value: int) -> None:
        self._words[at] = value
        self._written()


def on_node(members: list[Node], exchange: Callable[[SimulatedLink], Steps], seed: int = 0) -> None:
    """Run one exchange on every rank; nothing may pass but through the memory."""
    network = Network(len(members), seed)
    links = network.links()
    for link, node in zip(links, members, strict=True):
        link.node = node
    run(network, [exchange(link) for link in links])
    assert network.idle() and not any(network.sent_messages)
