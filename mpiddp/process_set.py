"""Process sets: collectives among some of the ranks. Each has a communicator, a negotiation and numbers of its own.

State: the sets that exist, by their id, in the runtime; an id means the same set on every rank, since sets are added
and removed by all ranks together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .errors import ArgumentError

if TYPE_CHECKING:
    from .engine import Channel

__all__ = ["ProcessSet", "global_process_set", "ranks_of"]


class ProcessSet:
    """Some of the world's ranks, in ascending order. ``ranks_or_comm``: world ranks, or an mpi4py communicator.

    To be added with :func:`add_process_set`, or passed to ``init(process_sets=[...])``, before it is used.
    """

    process_set_id: int | None

    def __init__(self, ranks_or_comm: Sequence[int] | Any) -> None:
        self.process_set_id = None
        self.ranks: list[int] = ranks_of(ranks_or_comm)
        self.channel: Channel | None = None  # on members, once the set is added

    def size(self) -> int | None:
        """The number of members; None before the set is added."""
        return None if self.process_set_id is None else len(self.ranks)

    def rank(self) -> int | None:
        """This process's rank within the set; None if it is no member, or before the set is added."""
        return None if self.channel is None else self.channel.link.rank

    def included(self) -> bool | None:
        """Whether this process is a member; None before the set is added."""
        return None if self.process_set_id is None else self.channel is not None

    def __repr__(self) -> str:
        return f"ProcessSet(id={self.process_set_id}, ranks={self.ranks})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ProcessSet):
            return NotImplemented
        return self.ranks == other.ranks and self.process_set_id == other.process_set_id

    __hash__ = object.__hash__

    def __deepcopy__(self, memo: dict[int, Any]) -> ProcessSet:
        return self  # a copied module speaks with the same ranks

    def __reduce__(self) -> str | tuple[type[ProcessSet], tuple[list[int]]]:
        """A pickle holds the ranks: what comes back is to be added anew, unless it is the world's own set."""
        return "global_process_set" if self is global_process_set else (ProcessSet, (self.ranks,))


def ranks_of(ranks_or_comm: Sequence[int] | Any) -> list[int]:
    """World ranks, ascending."""
    if hasattr(ranks_or_comm, "Get_group"):
        from mpi4py import MPI

        group, world = ranks_or_comm.Get_group(), MPI.COMM_WORLD.Get_group()
        return sorted(int(r) for r in MPI.Group.Translate_ranks(group, None, world))
    ranks = [int(rank) for rank in ranks_or_comm]
    if len(set(ranks)) != len(ranks) or any(rank < 0 for rank in ranks):
        raise ArgumentError(f"a process set is a list of distinct ranks, not {ranks}")
    return sorted(ranks)


#: All ranks: the default of every collective. Its id is 0.
global_process_set = ProcessSet([])
