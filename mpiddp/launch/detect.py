"""Which launcher started this process, and what it says about the job: read from the environment alone.

=========  ===========================================================================================================
open mpi   ``OMPI_COMM_WORLD_{RANK,SIZE,LOCAL_RANK,LOCAL_SIZE}`` (mpirun, prterun)
mpich      ``PMI_{RANK,SIZE}``, ``MPI_LOCALRANKID``, ``MPI_LOCALNRANKS`` (hydra)
intel mpi  the same, and ``I_MPI_HYDRA_UUID``
jsm        ``JSM_NAMESPACE_{RANK,SIZE,LOCAL_RANK,LOCAL_SIZE}`` (jsrun); it sets Open MPI's names as well
flux       ``FLUX_TASK_RANK``, ``FLUX_JOB_SIZE``, ``FLUX_TASK_LOCAL_ID``
pals       ``PALS_{RANKID,LOCAL_RANKID,LOCAL_SIZE}``; the job's size is in ``PMI_SIZE`` or nowhere
slurm      ``SLURM_STEP_ID`` with ``SLURM_PROCID``, ``SLURM_STEP_NUM_TASKS``, ``SLURM_LOCALID``: a *step* of srun only
pmix, pmi  ``PMIX_RANK`` (no size is given), ``PMI_RANK`` with ``PMI_SIZE``
=========  ===========================================================================================================

The order matters. mpirun inside a Slurm job starts its remote daemons by srun, whose step counts daemons: so Open MPI's
and hydra's names are looked at before Slurm's. Flux imitates PALS. Slurm's own PMI names come with its step.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from .environment import is_stale

__all__ = ["Launch", "detect"]

#: Slurm numbers real steps from 0; the batch script, the external and the interactive step have ids from here on.
SLURM_FIRST_SPECIAL_STEP = 4294967280


@dataclasses.dataclass(frozen=True)
class Launch:
    """What the launcher says. ``None``: it does not say. ``variables`` are the names that it was told by."""

    kind: str
    rank: int | None = None
    size: int | None = None
    local_rank: int | None = None
    local_size: int | None = None
    variables: tuple[str, ...] = ()

    @property
    def is_one_node(self) -> bool:
        """Whether all ranks are on this node, as far as the launcher says; the same on all of them."""
        return self.kind == "none" or (self.size is not None and self.size == self.local_size)

    @property
    def least_size(self) -> int:
        """The number of ranks that the launcher vouches for: the job's, or where it hides that, this node's."""
        return max(self.size or 1, self.local_size or 1, (self.rank or 0) + 1)


@dataclasses.dataclass(frozen=True)
class _Rule:
    """A launcher and its variables; it is recognised when all of ``needs`` are set."""

    kind: str
    needs: tuple[str, ...]
    rank: str
    size: str
    local_rank: str
    local_size: str = ""

    def read(self, environ: Mapping[str, str]) -> Launch:
        names = (self.rank, self.size, self.local_rank, self.local_size)
        rank, size, local_rank, local_size = (_number(environ.get(n)) for n in names)
        told_by = tuple(n for n in dict.fromkeys((*self.needs, *names)) if n in environ)
        return Launch(self.kind, rank, size, local_rank, local_size, told_by)


_HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
_RULES = (
    _Rule(
        "jsm",
        ("JSM_NAMESPACE_RANK",),
        "JSM_NAMESPACE_RANK",
        "JSM_NAMESPACE_SIZE",
        "JSM_NAMESPACE_LOCAL_RANK",
        "JSM_NAMESPACE_LOCAL_SIZE",
    ),
    _Rule(
        "open mpi",
        ("OMPI_COMM_WORLD_SIZE",),
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _Rule("intel mpi", ("I_MPI_HYDRA_UUID", "MPI_LOCALNRANKS"), *_HYDRA),
    _Rule("mpich", ("MPI_LOCALNRANKS",), *_HYDRA),
    _Rule("flux", ("FLUX_TASK_RANK", "FLUX_JOB_SIZE"), "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID"),
    _Rule("pals", ("PALS_RANKID",), "PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
    _Rule("slurm", ("SLURM_STEP_ID", "SLURM_PROCID"), "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    _Rule("pmix", ("PMIX_RANK", "PMIX_NAMESPACE"), "PMIX_RANK", "", "PMIX_LOCAL_RANK"),
    _Rule("pmi", ("PMI_RANK", "PMI_SIZE"), "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
)


def detect(environ: Mapping[str, str], pid: int | None = None) -> Launch:
    """Who started the process ``pid`` (this one, unless given), and as which rank of how many.

    A plain child process of a rank (``python eval.py`` run by rank 0) still sees part of its parent's variables; it was
    started by no launcher.
    """
    if is_stale(environ, os.getpid() if pid is None else pid):
        return Launch("none")
    for rule in _RULES:
        if all(n in environ for n in rule.needs) and not (rule.kind == "slurm" and _is_special_step(environ)):
            launch = rule.read(environ)
            return _with_local_size(launch, environ) if launch.kind == "slurm" else launch
    return Launch("none")


def _is_special_step(environ: Mapping[str, str]) -> bool:
    step = _number(environ["SLURM_STEP_ID"])
    return step is None or step >= SLURM_FIRST_SPECIAL_STEP


def _with_local_size(launch: Launch, environ: Mapping[str, str]) -> Launch:
    """Slurm lists the tasks per node as ``3(x2),1``: the entry of this node, by its number in the step."""
    node = _number(environ.get("SLURM_NODEID"))
    counts: list[int] = []
    for item in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        count, _, repeat = item.strip().rstrip(")").partition("(x")
        counts += [_number(count) or 0] * (_number(repeat) or 1)
    if node is None or not 0 <= node < len(counts):
        return launch
    return dataclasses.replace(launch, local_size=counts[node] or None)


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.strip().isdigit() else None
