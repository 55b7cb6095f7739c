"""Each node for itself: cores, memory that its ranks share, limits."""

from __future__ import annotations

from collections.abc import Iterator

from ....binding import warnings_for_node
from ..facts import Facts, Job
from ..finding import Finding, note, on_ranks, warning

__all__ = ["CHECKS", "LOW_SHM_NBYTES"]

#: Docker's default for /dev/shm is 64 MiB; Open MPI's own shared memory and DataLoader workers want more.
LOW_SHM_NBYTES = 256 << 20

#: What a rank opens: sockets to its peers, a file for each large tensor that it shares, its DataLoader workers' pipes.
_FEW_FILES = 1024


def binding_fits(job: Job) -> Iterator[Finding]:
    """Too few cores for a rank, or too many threads: the same lines as init()'s."""
    for ranks in job.nodes().values():
        for text in warnings_for_node([each.cpus for each in ranks], ranks[0].launch.kind):
            what, _, cure = text.rpartition(": ")
            yield warning("binding", f"{what} ({_where(ranks)})", cure)


def cores_are_not_shared(job: Job) -> Iterator[Finding]:
    """Ranks bound to the same few cores, or more ranks than the node has cores."""
    for ranks in job.nodes().values():
        usable = ranks[0].cpus.cores(frozenset[int]().union(*(each.cpus.usable for each in ranks)))
        if len(ranks) > usable:
            yield note(
                "oversubscribed",
                f"{len(ranks)} ranks have {usable} core(s) between them ({_where(ranks)})",
                "for measurements start no more ranks than cores",
            )
            continue
        crowded = sorted({tuple(e.rank for e in crowd) for each in ranks if (crowd := _crowd(each, ranks))})
        for numbers in crowded:
            yield warning(
                "shared-cores",
                f"{on_ranks(numbers)[3:]} share fewer cores than they are ({_where(ranks)}), others are idle",
                "start one mpirun a node, or give each its own cores: `mpirun --bind-to core --map-by slot:PE=N`",
            )


def _crowd(own: Facts, ranks: list[Facts]) -> list[Facts]:
    """The ranks that share this one's cores, if these are fewer than the ranks."""
    sharing = [each for each in ranks if each.cpus.affinity & own.cpus.affinity]
    cores = own.cpus.cores(frozenset[int]().union(*(each.cpus.affinity for each in sharing)))
    return sharing if len(sharing) > cores else []


def memory_is_shared(job: Job) -> Iterator[Finding]:
    """How the ranks of a node exchange, and the room in /dev/shm."""
    for ranks in job.nodes().values():
        first, where = ranks[0], _where(ranks)
        if len(ranks) > 1 and first.memory == "private":
            yield warning(
                "memory-private",
                f"the ranks share no memory ({where}), so exchanges between them go through MPI, several times slower",
                "let them open each other's /proc/<pid>/fd (in containers: one PID namespace for all ranks of a host), "
                "or give them one large /dev/shm; docs/shared_memory.md",
            )
        small = first.machine.shm_free_nbytes is not None and first.machine.shm_free_nbytes < LOW_SHM_NBYTES
        if small:
            free = (first.machine.shm_free_nbytes or 0) >> 20
            kind = warning if first.memory == "named files" else note
            yield kind(
                "shm-small",
                f"/dev/shm has {free} MiB left ({where})"
                + (": tensors that ranks share must fit" if kind is warning else "; mpiddp does not need it here"),
                "in Docker `--shm-size=8g` or `--ipc=host`; DataLoader workers need it, too",
            )


def limits_are_wide(job: Job) -> Iterator[Finding]:
    """ulimits that stop a job late."""
    for ranks in job.nodes().values():
        limits, where = ranks[0].machine.limits, _where(ranks)
        files, locked, space = limits.get("NOFILE"), limits.get("MEMLOCK"), limits.get("AS")
        if files is not None and files < _FEW_FILES:
            yield warning(
                "open-files", f"a process may open {files} files ({where})", "`ulimit -n 4096` before the start"
            )
        rdma = [fabric for fabric in ranks[0].machine.fabrics if fabric.kind in ("InfiniBand", "RoCE")]
        if rdma and locked is not None:
            yield warning(
                "locked-memory",
                f"a process may lock {locked >> 10} KiB of memory, and {rdma[0].kind} needs it without limit ({where})",
                "`ulimit -l unlimited`; under Slurm in the daemon's unit: LimitMEMLOCK=infinity",
            )
        if space is not None:
            yield warning(
                "address-space",
                f"the address space is limited to {space >> 30} GiB ({where}); CUDA and large tensors need more",
                "`ulimit -v unlimited` before the start",
            )


def _where(ranks: list[Facts]) -> str:
    return f"{ranks[0].host}, {on_ranks(each.rank for each in ranks)}"


CHECKS = (binding_fits, cores_are_not_shared, memory_is_shared, limits_are_wide)
