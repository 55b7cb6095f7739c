"""Each node for itself: cores, memory that its ranks share, limits."""

from __future__ import annotations

from collections.abc import Iterator

from ....binding import warnings_for_node
from ..facts import Facts, Job
from ..finding import Finding, note, on_ranks, warning
from .places import each_node

__all__ = ["CHECKS", "LOW_SHM_NBYTES"]

#: Docker's default for /dev/shm is 64 MiB; Open MPI's own shared memory and DataLoader workers want more.
LOW_SHM_NBYTES = 256 << 20

#: What a rank opens: sockets to its peers, a file for each large tensor that it shares, its DataLoader workers' pipes.
_FEW_FILES = 1024


def binding_fits(job: Job) -> Iterator[Finding]:
    """Too few cores for a rank, or too many threads: the same lines as init()'s."""

    def look(ranks: list[Facts]) -> Iterator[Finding]:
        for text in warnings_for_node([each.cpus for each in ranks], ranks[0].launch.kind):
            what, _, cure = text.rpartition(": ")
            yield warning("binding", what, cure)

    return each_node(job, look)


def cores_are_not_shared(job: Job) -> Iterator[Finding]:
    """Ranks bound to the same few cores, or more ranks than the node has cores."""

    def look(ranks: list[Facts]) -> Iterator[Finding]:
        usable = ranks[0].cpus.cores(frozenset[int]().union(*(each.cpus.usable for each in ranks)))
        if len(ranks) > usable:
            yield note(
                "oversubscribed",
                f"{len(ranks)} ranks have {usable} core(s) between them",
                "for measurements start no more ranks than cores",
            )
            return
        for numbers in sorted({tuple(e.local_rank for e in crowd) for each in ranks if (crowd := _crowd(each, ranks))}):
            yield warning(
                "shared-cores",
                f"local {on_ranks(numbers)[3:]} share fewer cores than they are, others are idle",
                "start one mpirun a node, or give each its own cores"
                + ": `mpirun --bind-to core --map-by slot:PE=N`" * job.is_open_mpi,
            )

    return each_node(job, look)


def _crowd(own: Facts, ranks: list[Facts]) -> list[Facts]:
    """The ranks that share this one's cores, if these are fewer than the ranks."""
    sharing = [each for each in ranks if each.cpus.affinity & own.cpus.affinity]
    cores = own.cpus.cores(frozenset[int]().union(*(each.cpus.affinity for each in sharing)))
    return sharing if len(sharing) > cores else []


def memory_is_shared(job: Job) -> Iterator[Finding]:
    """How the ranks of a node exchange."""

    def look(ranks: list[Facts]) -> Iterator[Finding]:
        if len(ranks) > 1 and ranks[0].memory == "private":
            yield warning(
                "memory-private",
                "the ranks share no memory, so exchanges between them go through MPI, several times slower",
                "let them open each other's /proc/<pid>/fd (in containers: one PID namespace for all ranks of a host), "
                "or give them one large /dev/shm; docs/shared_memory.md",
            )

    return each_node(job, look)


def shm_has_room(job: Job) -> Iterator[Finding]:
    """The room in /dev/shm, which counts where memory is shared by named files."""

    def look(ranks: list[Facts]) -> Iterator[Finding]:
        free = ranks[0].machine.shm_free_nbytes
        if free is None or free >= LOW_SHM_NBYTES:
            return
        cure = "in Docker `--shm-size=8g` or `--ipc=host`; DataLoader workers need it, too"
        if ranks[0].memory == "named files":
            yield warning("shm-small", f"/dev/shm has {free >> 20} MiB left: tensors that ranks share must fit", cure)
        else:
            yield note("shm-small", f"/dev/shm has {free >> 20} MiB left; mpiddp itself does not need it here", cure)

    return each_node(job, look)


def limits_are_wide(job: Job) -> Iterator[Finding]:
    """ulimits that stop a job late."""

    def look(ranks: list[Facts]) -> Iterator[Finding]:
        machine = ranks[0].machine
        files, locked, space = (machine.limits.get(name) for name in ("NOFILE", "MEMLOCK", "AS"))
        if files is not None and files < _FEW_FILES:
            yield warning("open-files", f"a process may open {files} files", "`ulimit -n 4096` before the start")
        rdma = [fabric for fabric in machine.fabrics if fabric.kind in ("InfiniBand", "RoCE")]
        if rdma and locked is not None:
            yield warning(
                "locked-memory",
                f"a process may lock {locked >> 10} KiB of memory, and {rdma[0].kind} needs it without limit",
                "`ulimit -l unlimited`; under Slurm in the daemon's unit: LimitMEMLOCK=infinity",
            )
        if space is not None:
            yield warning(
                "address-space",
                f"the address space is limited to {space >> 30} GiB; CUDA and large tensors need more",
                "`ulimit -v unlimited` before the start",
            )

    return each_node(job, look)


CHECKS = (binding_fits, cores_are_not_shared, memory_is_shared, shm_has_room, limits_are_wide)
