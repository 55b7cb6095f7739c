"""The launcher's command line, from what is asked for and what is known of this machine. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...launch import TCP, UCX, is_open
from .launchers import Launcher

__all__ = ["Job", "Machine", "command_line"]

#: What every rank should know, wherever it runs; more by ``-x``.
_PASSED_PREFIX = "MPIDDP_"


@dataclass(frozen=True)
class Job:
    """What is asked for. ``hosts`` are ``a:4,b:4``; ``cpus`` the cores of a rank, None: as many as there are.
    ``passed`` are ``NAME`` or ``NAME=VALUE``, ``more`` the launcher's own arguments."""

    ranks: int
    program: Sequence[str]
    hosts: str = ""
    hostfile: str = ""
    cpus: int | None = None
    passed: Sequence[str] = ()
    more: Sequence[str] = ()
    mpi: str = "pmix"


@dataclass(frozen=True)
class Machine:
    """What is known here: the cores that this host's ranks may use, whether we are root, the environment, whether
    this host has a GPU and the wheels whose MPI takes its memory, and the parameters of Open MPI that the environment
    and its files have chosen, and the CPUs of a core (hyperthreads)."""

    cores: int
    is_root: bool
    environ: Mapping[str, str]
    has_cuda_wheels: bool = False
    chosen: Mapping[str, str] = field(default_factory=dict)
    cpus_per_core: int = 1


def command_line(launcher: Launcher, job: Job, machine: Machine) -> list[str]:
    """The whole command, to be executed as it is. Raises ValueError where the launcher cannot do what is asked for."""
    dialects = {"open mpi": _open_mpi, "mpich": _hydra, "intel mpi": _hydra, "slurm": _srun}
    words = [launcher.path, *dialects[launcher.kind](launcher, job, machine), *job.more, *job.program]
    return [*_environment(job, machine), *words] if launcher.kind == "slurm" else words


def _cpus(job: Job, machine: Machine) -> int | None:
    """The cores of each rank: as asked for, as Slurm has it, or all there are; None: unknown, or too few for one each.

    The cores of other hosts are not known here.
    """
    if job.cpus is not None:
        return job.cpus
    allotted = machine.environ.get("SLURM_CPUS_PER_TASK", "")
    if allotted.isdigit():
        return max(1, int(allotted) // machine.cpus_per_core)  # Slurm counts hyperthreads
    if _is_elsewhere(job, machine):
        return None
    return machine.cores // job.ranks or None


#: Slurm, PBS, LSF, Grid Engine and Flux: mpirun takes the hosts of their jobs by itself.
_ALLOCATIONS = ("SLURM_JOB_ID", "PBS_NODEFILE", "LSB_HOSTS", "LSB_MCPU_HOSTS", "PE_HOSTFILE", "FLUX_JOB_ID")


def _is_elsewhere(job: Job, machine: Machine) -> bool:
    """Whether ranks may start on other hosts than this one."""
    return bool(job.hosts or job.hostfile) or any(name in machine.environ for name in _ALLOCATIONS)


def _is_crowded(job: Job, machine: Machine) -> bool:
    """More ranks than cores: they must give way to each other."""
    return not _is_elsewhere(job, machine) and job.ranks > machine.cores


_TRUE = ("1", "true", "yes", "on")


def _settings(job: Job, machine: Machine) -> dict[str, str]:
    """What the ranks' environment will hold of ours."""
    return {**machine.environ, **dict(item.split("=", 1) for item in job.passed if "=" in item)}


def _is_fault_tolerant(job: Job, machine: Machine) -> bool:
    return _settings(job, machine).get("MPIDDP_FAULT_TOLERANT", "").lower() in _TRUE


def _gives_gpus(job: Job, machine: Machine) -> bool:
    """Whether MPI is to take GPUs' memory: as the user has it, else where the wheels can, all ranks are here, and
    nothing is set that excludes it."""
    settings = _settings(job, machine)
    wanted = settings.get("MPIDDP_CUDA_AWARE", "")
    if wanted or not machine.has_cuda_wheels:
        return machine.has_cuda_wheels and wanted.lower() in _TRUE
    if settings.get("MPIDDP_LOCAL", "").lower() == "nccl" or _is_fault_tolerant(job, machine):
        return False
    chosen = _chosen(job, machine)
    if chosen.get("pml") != "ucx" and not is_open(chosen, "ucx"):
        return False
    return not _is_elsewhere(job, machine)


_MCA_FLAGS = ("mca", "gmca", "omca")


def _chosen(job: Job, machine: Machine) -> dict[str, str]:
    """Open MPI's parameters that somebody has chosen: its files, the environment, ``-x``, the launcher's own words."""
    words = [word.lstrip("-") if word.startswith("-") else "" for word in job.more]
    named = {job.more[at + 1]: job.more[at + 2] for at, word in enumerate(words[:-2]) if word in _MCA_FLAGS}
    passed = dict(
        item.removeprefix("OMPI_MCA_").split("=", 1)
        for item in job.passed
        if item.startswith("OMPI_MCA_") and "=" in item
    )
    return {**machine.chosen, **passed, **named}


def _passed(job: Job, machine: Machine, cpus: int | None) -> dict[str, str | None]:
    """Variables for the ranks, with their values where they are not those that we have."""
    passed: dict[str, str | None] = {name: None for name in sorted(machine.environ) if name.startswith(_PASSED_PREFIX)}
    if "MPIDDP_CUDA_AWARE" not in passed and _gives_gpus(job, machine):
        passed["MPIDDP_CUDA_AWARE"] = "1"
    if "OMP_NUM_THREADS" in machine.environ:
        passed["OMP_NUM_THREADS"] = None
    elif cpus is not None or _is_crowded(job, machine):
        passed["OMP_NUM_THREADS"] = str(cpus or 1)  # or every rank starts a thread for every core
    for item in job.passed:
        name, equals, value = item.partition("=")
        passed[name] = value if equals else None
    return passed


def _open_mpi(launcher: Launcher, job: Job, machine: Machine) -> list[str]:
    words = ["--allow-run-as-root"] if machine.is_root else []
    words += ["-np", str(job.ranks)]
    words += ["--host", job.hosts] if job.hosts else []
    words += ["--hostfile", job.hostfile] if job.hostfile else []
    cpus, crowded = _cpus(job, machine), _is_crowded(job, machine)
    words += ["--oversubscribe"] if crowded else []
    # Without a word on binding, one or two ranks get a single core each.
    words += ["--bind-to", "none"] if cpus is None else ["--map-by", f"slot:PE={cpus}", "--bind-to", "core"]
    # What init() would set; but here it is seen, holds before Python starts, and reaches every host.
    wanted = TCP | ({"mpi_yield_when_idle": "1"} if crowded else {}) | (UCX if _gives_gpus(job, machine) else {})
    wanted |= {"pml": "ob1"} if _is_fault_tolerant(job, machine) else {}
    chosen = _chosen(job, machine)
    for name, value in wanted.items():
        if name not in chosen or (name == "pml" and is_open(chosen, value)):  # "^ob1" chooses none
            words += ["--mca", name, value]
    for name, given in _passed(job, machine, cpus).items():
        words += ["-x", name if given is None else f"{name}={given}"]
    return words


def _hydra(launcher: Launcher, job: Job, machine: Machine) -> list[str]:
    words = ["-n", str(job.ranks)]
    words += ["-hosts", job.hosts] if job.hosts else []
    words += ["-f", job.hostfile] if job.hostfile else []
    cpus = _cpus(job, machine)
    if launcher.kind == "intel mpi":
        words += (
            ["-genv", "I_MPI_PIN", "0"]
            if cpus is None
            else ["-genv", "I_MPI_PIN_DOMAIN", str(cpus * machine.cpus_per_core)]
        )
    else:
        words += ["-bind-to", "none" if cpus is None else f"core:{cpus}"]
    for name, given in _passed(job, machine, cpus).items():
        if given is not None:  # hydra hands on what we have by itself
            words += ["-genv", name, given]
    return words


def _srun(launcher: Launcher, job: Job, machine: Machine) -> list[str]:
    cpus = _cpus(job, machine)
    words = ["-n", str(job.ranks), f"--mpi={job.mpi}", *(_srun_nodes(job) if job.hosts else [])]
    words += ["--export=ALL"] if _passed(job, machine, cpus) else []  # sbatch may have said otherwise
    if cpus is None:
        return [*words, "--cpu-bind=none"]
    # srun does not take --cpus-per-task over from sbatch; more than sbatch has it would wait for ever.
    allotted = "" if job.cpus else machine.environ.get("SLURM_CPUS_PER_TASK", "")
    count = allotted if allotted.isdigit() else cpus * machine.cpus_per_core
    return [*words, f"--cpus-per-task={count}", "--cpu-bind=cores"]


def _environment(job: Job, machine: Machine) -> list[str]:
    """Variables for srun itself, which hands its environment on: ``--export`` would end a value at its first comma."""
    passed = _passed(job, machine, _cpus(job, machine))
    given = [f"{name}={value}" for name, value in passed.items() if value is not None]
    return ["/usr/bin/env", *given] if given else []


def _srun_nodes(job: Job) -> list[str]:
    """The nodes, and the ranks on each, filled up in their order as mpirun does it."""
    if "[" in job.hosts and ":" not in job.hosts:
        return [f"--nodelist={job.hosts}"]  # Slurm's own n[1-4]
    if "[" in job.hosts:
        raise ValueError(f"-H {job.hosts}: name the hosts one by one, or leave out their slots")
    slots: dict[str, int] = {}
    for item in job.hosts.split(","):
        host, colon, given = item.partition(":")
        if colon and not given.isdigit():
            raise ValueError(f"{item} is no host and its slots: a:4")
        slots[host] = slots.get(host, 0) + int(given or 1)
    if ":" not in job.hosts and max(slots.values()) == 1:
        return [f"--nodes={len(slots)}", f"--nodelist={','.join(slots)}"]
    left = job.ranks
    used: dict[str, int] = {}
    for host, count in slots.items():
        if left and count:
            used[host] = min(count, left)
            left -= used[host]
    if left or len(set(used.values())) > 1:
        layout = ", ".join(f"{count} on {host}" for host, count in used.items())
        why = f"{left} more than the slots" if left else "srun puts as many on every node"
        raise ValueError(f"-np {job.ranks} -H {job.hosts} is {layout}, and {why}: correct it, or --launcher mpirun")
    each = next(iter(used.values()))
    return [f"--nodes={len(used)}", f"--ntasks-per-node={each}", f"--nodelist={','.join(used)}"]
