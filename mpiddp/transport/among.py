"""Some of a link's members as a link of their own: the ranks of a node, or those that share a local rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .base import Link, Pending, Region
from .device import Ways
from .node import Node

__all__ = ["Among"]


class Among:
    """``ranks`` are the members' ranks in ``whole``, this member's among them. It shares the tags of ``whole``."""

    __slots__ = ("_ranks", "_ways", "_whole", "algorithm", "gpus", "levels", "nccl", "node", "rank", "size")

    def __init__(self, whole: Link, ranks: Sequence[int], node: Node | None = None) -> None:
        self._whole, self._ranks = whole, list(ranks)
        self.rank, self.size = self._ranks.index(whole.rank), len(self._ranks)
        self._ways: Ways | None = None
        self.gpus = self.nccl = None
        self.node, self.algorithm, self.levels = node, whole.algorithm, None

    @property
    def ways(self) -> Ways:
        """See :class:`~mpiddp.transport.base.Link`."""
        if self._ways is None:
            self._ways = self._whole.ways.among(self._ranks)
        return self._ways

    def open(self, flat: torch.Tensor) -> _Region:
        """See :class:`~mpiddp.transport.base.Link`."""
        return _Region(self._whole.open(flat), self._ranks)

    def __repr__(self) -> str:
        return f"Among(ranks {self._ranks} of {self._whole!r})"


class _Region:
    __slots__ = ("_ranks", "_region")

    def __init__(self, region: Region, ranks: Sequence[int]) -> None:
        self._region, self._ranks = region, ranks

    def send(self, lo: int, hi: int, peer: int, tag: int) -> Pending:
        return self._region.send(lo, hi, self._ranks[peer], tag)

    def recv(self, lo: int, hi: int, peer: int, tag: int) -> Pending:
        return self._region.recv(lo, hi, self._ranks[peer], tag)
