"""The world: who is where, and the communicators that are the library's own.

Nodes are found by MPI (``COMM_TYPE_SHARED``), never guessed from host names: two containers may share a name, and one
host may be seen under several.
"""

from __future__ import annotations

import socket
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from .errors import LaunchError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["THREAD_LEVELS", "World", "is_mpi_running", "library_name", "start_mpi"]

#: MPI's thread levels by their value; the standard orders them so.
THREAD_LEVELS = ("single", "funneled", "serialized", "multiple")


@dataclass(frozen=True)
class World:
    """What does not change between ``init()`` and ``shutdown()``.

    ``local`` is within a node, ``cross`` among the ranks of the same local rank on all nodes. ``nodes[r]`` is the
    index of rank r's node; nodes are numbered by their lowest rank.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int
    is_homogeneous: bool
    nodes: tuple[int, ...]
    host: str
    thread_level: str
    comm: MPI.Intracomm
    node_comm: MPI.Intracomm

    @classmethod
    def over(cls, comm: MPI.Intracomm | Sequence[int] | None) -> World:
        """The world over ``comm``: a communicator (duplicated, never used itself), world ranks, or None for all ranks.

        Collective over the members. Raises LaunchError on a process that is no member.
        """
        from mpi4py import MPI

        own = _duplicate(comm, MPI)
        node_comm: Any = _on_node(own)
        leader = node_comm.bcast(own.rank, 0)
        leaders = own.allgather(leader)
        number = {lead: index for index, lead in enumerate(sorted(set(leaders)))}
        nodes = tuple(number[lead] for lead in leaders)
        local_ranks = [nodes[:r].count(nodes[r]) for r in range(own.size)]
        peers = [r for r in range(own.size) if local_ranks[r] == local_ranks[own.rank]]
        return cls(
            rank=own.rank,
            size=own.size,
            local_rank=local_ranks[own.rank],
            local_size=node_comm.size,
            cross_rank=peers.index(own.rank),
            cross_size=len(peers),
            is_homogeneous=len(set(Counter(nodes).values())) == 1,
            nodes=nodes,
            host=socket.gethostname(),
            thread_level=THREAD_LEVELS[_level_index(MPI)],
            comm=own,
            node_comm=node_comm,
        )

    def free(self) -> None:
        """Give the communicators back. Collective over the members."""
        self.node_comm.Free()
        self.comm.Free()

    def __repr__(self) -> str:
        return (
            f"World(rank {self.rank} of {self.size}, local {self.local_rank} of {self.local_size}, "
            f"node {self.nodes[self.rank]} of {max(self.nodes) + 1}, MPI threads {self.thread_level})"
        )


def is_mpi_running() -> bool:
    """Whether somebody has started MPI."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is not None and mpi.Is_initialized()


def start_mpi() -> Any:
    """mpi4py's MPI, started. Raises LaunchError where it is over already, or was not to be started."""
    from mpi4py import MPI

    if MPI.Is_finalized():
        raise LaunchError(
            "MPI has been finalized and cannot be started again in one process; call mpiddp.init() before that"
        )
    if not MPI.Is_initialized():
        raise LaunchError(
            "MPI is not started: mpi4py.rc.initialize is False, so call MPI.Init_thread() before mpiddp.init(), "
            "or leave it True"
        )
    return MPI


def library_name() -> str:
    """What the MPI that is loaded calls itself, with its version: ``Open MPI v5.0.8``."""
    from mpi4py import MPI

    return MPI.Get_library_version().split("\n")[0].split(",")[0].strip("\0 ")


def _on_node(comm: MPI.Intracomm) -> Any:
    """The ranks of ``comm`` that share this one's node."""
    from mpi4py import MPI

    return comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank)


def _duplicate(comm: MPI.Intracomm | Sequence[int] | None, mpi: Any) -> MPI.Intracomm:
    if comm is None:
        return _checked(mpi.COMM_WORLD.Dup())
    if isinstance(comm, mpi.Intracomm):
        return _checked(comm.Dup())
    ranks = list(cast("Sequence[int]", comm))
    everyone = mpi.COMM_WORLD
    if not ranks:
        return _checked(everyone.Dup())  # Horovod's default: an empty list means all ranks
    wrong = [r for r in ranks if not 0 <= r < everyone.size]
    if wrong or len(set(ranks)) != len(ranks):
        raise LaunchError(
            f"init(comm={ranks}) must list distinct ranks between 0 and {everyone.size - 1}"
            + (f"; {wrong} are not" if wrong else "")
        )
    if everyone.rank not in ranks:
        raise LaunchError(
            f"rank {everyone.rank} called init(comm={ranks}) and is not in that list; call it on members only"
        )
    group = everyone.group.Incl(ranks)
    return _checked(everyone.Create_group(group))


def _checked(comm: MPI.Intracomm) -> MPI.Intracomm:
    from mpi4py import MPI

    comm.Set_errhandler(MPI.ERRORS_RETURN)  # mpi4py turns errors into exceptions
    return comm


def _level_index(mpi: Any) -> int:
    levels = (mpi.THREAD_SINGLE, mpi.THREAD_FUNNELED, mpi.THREAD_SERIALIZED, mpi.THREAD_MULTIPLE)
    return levels.index(mpi.Query_thread())
