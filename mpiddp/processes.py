"""What /proc tells about this process's ancestors and libraries, and the cores that the ranks of this node may use."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import NamedTuple

__all__ = ["LAUNCHERS", "Daemon", "daemon", "generation", "libmpi_path", "parent_pid", "usable_cpus"]

#: The programs of Open MPI 4 and 5, MPICH and Intel MPI that are parents of ranks. Slurm's slurmstepd is none of them:
#: it belongs to no MPI, and is not confined to the job's cores.
LAUNCHERS = frozenset(
    {
        *("mpirun", "mpirun.openmpi", "orterun", "orted", "prterun", "prte", "prted"),
        *("mpiexec", "mpiexec.hydra", "hydra_pmi_proxy", "hydra_bstrap_proxy"),
    }
)
#: Between a rank and its launcher: a shell or a wrapper script, seldom more.
_MAX_GENERATIONS = 8


_generation = 0


def generation() -> int:
    """How many forks lie between this process and the one that imported this: tells whether it is still that one.

    Costs no system call, as asking for the process id does.
    """
    return _generation


def _one_more() -> None:
    global _generation
    _generation += 1


os.register_at_fork(after_in_child=_one_more)


class Daemon(NamedTuple):
    """The launcher's process on this node, an ancestor of this one; ``exe`` is the file that it runs."""

    pid: int
    exe: str


def daemon(pid: int | None = None, proc: Path = Path("/proc")) -> Daemon | None:
    """The nearest ancestor of ``pid`` (this process) that is a launcher; None where /proc does not tell."""
    current = os.getpid() if pid is None else pid
    for _ in range(_MAX_GENERATIONS):
        current = parent_pid(current, proc)
        if current <= 1:
            return None
        exe = _exe(proc / str(current) / "exe")
        if PurePosixPath(exe).name in LAUNCHERS:
            return Daemon(current, exe)
    return None


def _exe(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""  # another user's process, such as slurmstepd


def parent_pid(pid: int, proc: Path = Path("/proc")) -> int:
    """The parent of process ``pid``; 0 where /proc does not tell."""
    try:
        text = (proc / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[1])  # the name before it may hold blanks and brackets


def libmpi_path(maps: Path = Path("/proc/self/maps")) -> str | None:
    """The file of the MPI library that this process has loaded."""
    try:
        lines = maps.read_text(errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        path = line[line.find("/") :].removesuffix(" (deleted)")
        if PurePosixPath(path).name.startswith(("libmpi.so", "libmpich.so", "libmpi_ibm.so")):
            return path
    return None


def usable_cpus() -> frozenset[int]:
    """The logical CPUs that ranks on this node may use: this one's and its launcher's, which does not bind itself.

    Both are within what taskset or a cgroup leaves to the job. Where there is no launcher's process to ask, this
    one's alone.
    """
    if not hasattr(os, "sched_getaffinity"):  # macOS binds nothing
        return frozenset(range(os.cpu_count() or 1))
    own = os.sched_getaffinity(0)
    launcher = daemon()
    try:
        return frozenset(own | os.sched_getaffinity(launcher.pid)) if launcher else frozenset(own)
    except ProcessLookupError:
        return frozenset(own)  # the launcher has just ended
