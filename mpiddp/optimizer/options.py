"""What a user may choose about the exchange of gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..compression import Compression

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """How gradients are exchanged. ``groups`` gives some parameters (by position) the number of their group."""

    average: bool = True
    average_passes: bool = False
    compression: Any = Compression.none
    predivide: float = 1.0
    groups: Mapping[int, int] = field(default_factory=dict)
    sparse_as_dense: bool = False
    first_nbytes: int = 1 << 20
    bucket_nbytes: int = 25 << 20
    nodes: tuple[int, ...] = ()  # the members' nodes, where what is between them is to say how large buckets are
    segment_nbytes: int = 512 << 10
    heap_nbytes: int = 0  # that malloc is to keep, of what gradients leave behind; 0: as it does by itself
    is_ordered: bool = False  # the same bits for any size of buckets and any layout of the ranks over nodes

    @property
    def may_repeat(self) -> bool:
        """Whether exchanging what another backward added to an exchanged gradient gives the right one again: to an
        average it does, to a sum it does not."""
        return self.average and not self.average_passes
