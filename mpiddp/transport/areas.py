"""A small piece of shared memory for each slot of a node's page and each member: what is no larger needs no staging
buffer, no places, and no slicing of tensors, each of which costs as much as an exchange of 4 KiB."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..memory.node import NodeMemory

__all__ = ["AREA_NBYTES", "MEETING_AREA_NBYTES", "Areas"]

#: What fits, into the area of an exchange and into that of a meeting, of which there are few.
AREA_NBYTES = 128 << 10
MEETING_AREA_NBYTES = 1 << 20

#: Views that are remembered.
_MOST_VIEWS = 4096


class Areas:
    """``wholes``: of each member, the memory of all its areas, as bytes. ``starts``: where in it those of the slots
    begin."""

    def __init__(self, wholes: Sequence[torch.Tensor], starts: Sequence[int]) -> None:
        self._starts = starts
        self._tensors = list(wholes)  # they keep the mappings alive
        self._wholes = [whole.numpy() for whole in wholes]
        self._addresses = [whole.data_ptr() for whole in wholes]
        self._views: dict[tuple[int, int, np.dtype[Any]], list[np.ndarray[Any, Any]]] = {}
        self._pieces: dict[tuple[int, int, int, torch.dtype], torch.Tensor] = {}

    @classmethod
    def over(cls, comm: Any, local_ranks: Sequence[int], memory: NodeMemory, slots: int, meetings: int) -> Areas | None:
        """For so many slots, and so many of meetings behind them, of the members of ``comm``.

        None, on all of them, where some member has no memory left,
        or memory costs something before it is touched. Collective."""
        if not memory.is_lazy:
            return None
        *starts, end = cls.bounds(slots, meetings)
        own = memory.segments.empty((end,), torch.uint8)
        places = comm.allgather(memory.segments.place(own))
        if any(place is None for place in places):
            return None
        try:
            wholes = [
                own if member == comm.rank else memory.tensor(local_ranks[member], place, own.nbytes)
                for member, place in enumerate(places)
            ]
        except OSError:
            wholes = []
        return cls(wholes, starts) if all(comm.allgather(bool(wholes))) else None

    @staticmethod
    def bounds(slots: int, meetings: int) -> list[int]:
        """Where in a member's memory each area begins, and where the last one ends."""
        return [0, *itertools.accumulate([*[AREA_NBYTES] * slots, *[MEETING_AREA_NBYTES] * meetings])]

    def address(self, member: int, slot: int) -> int:
        """Where a member's area begins, in this process."""
        return self._addresses[member] + self._starts[slot]

    def piece(self, member: int, slot: int, nbytes: int, dtype: torch.dtype) -> torch.Tensor:
        """The first ``nbytes`` of one member's area."""
        key = member, slot, nbytes, dtype
        found = self._pieces.get(key)
        if found is None:
            if len(self._pieces) >= _MOST_VIEWS:
                self._pieces.clear()
            at = self._starts[slot]
            found = self._pieces[key] = self._tensors[member][at : at + nbytes].view(dtype)
        return found

    def views(self, slot: int, nbytes: int, dtype: np.dtype[Any]) -> list[np.ndarray[Any, Any]]:
        """The first ``nbytes`` of every member's area."""
        key = slot, nbytes, dtype
        found = self._views.get(key)
        if found is None:
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            at = self._starts[slot]
            found = self._views[key] = [whole[at : at + nbytes].view(dtype) for whole in self._wholes]
        return found
