"""Too few cores, or too many threads: one warning a node, with the launcher's own flag that cures it.

mpirun binds each of up to two ranks to one core, torch's threads and DataLoader workers included; and several unbound
ranks start a thread for every core of the node each. Neither is an error; both cost a factor.

The cores of the node are what its ranks *could* use: the union of their own and of their launcher's, which binds them
but not itself. So a taskset or a container's cpuset around mpirun is respected; of a container's quota (cpu.max) the
whole cores count. Under srun, which leaves no such process to ask, they are at least ``SLURM_CPUS_ON_NODE``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import config, processes

__all__ = ["NodeFacts", "cores", "cpus_per_core", "facts", "warnings_for_node"]


@dataclass(frozen=True)
class NodeFacts:
    """What a rank may use: logical CPUs, of which several can lie on one core. Sent to the node's first rank."""

    affinity: frozenset[int]
    usable: frozenset[int]
    core_of: Mapping[int, str]
    threads: int
    cpus_per_core: int = 1
    allotted_cpus: int | None = None
    quota_cpus: int | None = None

    def cores(self, cpus: frozenset[int]) -> int:
        """On how many cores ``cpus`` lie."""
        return len({self.core_of.get(cpu, str(cpu)) for cpu in cpus})


def facts() -> NodeFacts:
    """This process's part of the picture. After MPI has started, and once torch has its number of threads."""
    import torch

    usable = processes.usable_cpus()
    own = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else usable
    allotted = config.environ().get("SLURM_CPUS_ON_NODE", "")
    return NodeFacts(
        affinity=own,
        usable=usable,
        core_of={cpu: _core(cpu) for cpu in usable},
        threads=torch.get_num_threads(),
        cpus_per_core=cpus_per_core(usable),
        allotted_cpus=int(allotted) if allotted.isdigit() else None,
        quota_cpus=_quota(Path("/sys/fs/cgroup/cpu.max")),
    )


def cores(cpus: frozenset[int]) -> int:
    """On how many whole cores of this machine ``cpus`` lie, and a container's quota leaves."""
    found = len({_core(cpu) for cpu in cpus})
    return min(found, _quota(Path("/sys/fs/cgroup/cpu.max")) or found)


def cpus_per_core(cpus: frozenset[int]) -> int:
    """How many CPUs a core of this machine has (hyperthreads), the most of those that ``cpus`` lie on."""
    return max(_count(_core(cpu)) for cpu in cpus)


def _core(cpu: int) -> str:
    """A name for the core that ``cpu`` lies on: the list of the CPUs that share it."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _count(cpus: str) -> int:
    """How many CPUs a list of the kernel's names, such as ``0,64`` or ``0-1``."""
    ends = [[int(n) for n in part.split("-")] for part in cpus.split(",")]
    return sum(end[-1] - end[0] + 1 for end in ends)


def _quota(path: Path) -> int | None:
    """The whole CPUs that a container's quota amounts to, at least one; None without a quota (cgroup v2)."""
    try:
        limit, period = path.read_text().split()
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(1, int(limit) // int(period))


def warnings_for_node(ranks: Sequence[NodeFacts], kind: str) -> list[str]:
    """At most one line for the ranks of one node, in their order; ``kind`` is the launcher's (``Launch.kind``)."""
    share = max(1, _node_cores(ranks, kind) // len(ranks))
    bound = [f"{i} has {r.cores(r.affinity)}" for i, r in enumerate(ranks) if r.cores(r.affinity) < share]
    if bound:
        few = f"on this node each rank's share is {share} cores, but local rank {', '.join(bound)}"
        return [f"{few}: {_bind_flag(kind, share, ranks[0].cpus_per_core)}"]
    crowds = [text for i in range(len(ranks)) if (text := _crowd(i, ranks))]
    # One thread a rank cannot be reduced: more ranks than cores is the user's choice.
    if crowds and any(r.threads > 1 for r in ranks):
        return [f"on this node torch has {crowds[0]}: {_thread_flag(kind, share)}"]
    return []


def _node_cores(ranks: Sequence[NodeFacts], kind: str) -> int:
    """The cores that the ranks of the node could have between them."""
    name_of = {cpu: r.core_of.get(cpu, str(cpu)) for r in ranks for cpu in r.usable}
    cores = len(set(name_of.values()))
    if kind == "slurm":
        cores = max(cores, *((r.allotted_cpus or 0) // r.cpus_per_core for r in ranks))
    return min(cores, ranks[0].quota_cpus or cores)


def _crowd(index: int, ranks: Sequence[NodeFacts]) -> str | None:
    """What is wrong with the threads of the ranks that share CPUs with this one; None if nothing is."""
    sharing = [r for r in ranks if r.affinity & ranks[index].affinity]
    cpus = len(frozenset[int]().union(*(r.affinity for r in sharing)))
    cpus = min(cpus, ranks[index].quota_cpus or cpus)
    threads = sum(r.threads for r in sharing)
    if threads <= cpus:
        return None
    return f"{threads} threads of {len(sharing)} rank(s) on {cpus} CPU(s)"


def _bind_flag(kind: str, cores: int, cpus_per_core: int) -> str:
    cpus = cores * cpus_per_core  # what Intel MPI, Slurm and PALS count
    if kind == "open mpi":
        return f"start with `mpirun --map-by slot:PE={cores} --bind-to core`, or `--bind-to none`"
    if kind == "mpich":
        return f"start with `mpiexec -bind-to core:{cores}`, or `-bind-to none`"
    if kind == "intel mpi":
        return f"start with `mpiexec -genv I_MPI_PIN_DOMAIN {cpus}`, or `-genv I_MPI_PIN 0`"
    if kind == "slurm":
        return (
            f"start with `srun --cpus-per-task={cpus}` (srun does not take it over from sbatch), or `--cpu-bind=none`"
        )
    if kind == "pals":
        return f"start with `mpiexec --depth={cpus} --cpu-bind=depth`"
    if kind == "flux":
        return f"start with `flux run --cores-per-task={cores}`"
    if kind == "jsm":
        return f"start with `jsrun --cpu_per_rs={cores} --bind=packed:{cores}`"
    return f"let the launcher bind {cores} cores to each rank, or none"


def _thread_flag(kind: str, threads: int) -> str:
    ways = {
        "open mpi": f"start with `mpirun -x OMP_NUM_THREADS={threads}`",
        "mpich": f"start with `mpiexec -genv OMP_NUM_THREADS {threads}`",
        "intel mpi": f"start with `mpiexec -genv OMP_NUM_THREADS {threads}`",
        "pals": f"start with `mpiexec --env OMP_NUM_THREADS={threads}`",
        "jsm": f"start with `jsrun -E OMP_NUM_THREADS={threads}`",
    }
    return ways.get(kind, f"set OMP_NUM_THREADS={threads} before the start")
