"""The launcher's variables that make a process join the job, and taking them away from child processes.

A child that inherits them and starts MPI (a DataLoader worker whose dataset module imports mpi4py.MPI, a script run
by ``subprocess``) would claim its parent's rank, and the job crashes. Without them it is a world of one. They are
read once, when MPI starts, so that nothing is lost by removing them then.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from .. import config

__all__ = ["JOIN_PREFIXES", "MARKER", "after_mpi", "is_stale", "joins"]

#: PMIX and PRTE: Open MPI 4 and 5, and srun --mpi=pmix. PMI and HYDI: MPICH, Intel MPI, srun --mpi=pmi2, Cray.
#: ess, orte and pmix: Open MPI 4 tells its processes by these that they are no singletons; a child of theirs then fails
#: in MPI_Init ("Unreachable in file ext3x_client.c") when only the PMIX variables are gone.
JOIN_PREFIXES = ("PMIX_", "PRTE_", "PMI_", "PMI2_", "HYDI_", "OMPI_MCA_ess", "OMPI_MCA_orte_", "OMPI_MCA_pmix")

#: Set by users and sites, not by a launcher for one process: an mpirun started by a child may need them.
_KEPT_PREFIXES = ("PMIX_MCA_", "PRTE_MCA_", "PRTE_ALLOW_RUN_AS_ROOT")

#: Says to a child: what is left of the launcher's variables in your environment speaks of the process with this id.
MARKER = "_MPIDDP_JOINED"


def joins(environ: Mapping[str, str]) -> list[str]:
    """The names in ``environ`` that make a process join the job as one of its ranks."""
    return [n for n in environ if n.startswith(JOIN_PREFIXES) and not n.startswith(_KEPT_PREFIXES)]


def after_mpi(environ: Mapping[str, str]) -> dict[str, str]:
    """Take the joining variables out of the process's environment and leave a mark; return what was removed.

    What scripts read (``OMPI_COMM_WORLD_RANK``, ``MPI_LOCALRANKID``, ``SLURM_*``) stays. A second call removes nothing.
    """
    removed = config.remove(joins(environ))
    config.export({MARKER: str(os.getpid())})
    return removed


def is_stale(environ: Mapping[str, str], pid: int) -> bool:
    """Whether the launcher's variables in ``environ`` speak of an ancestor of process ``pid``, not of that process."""
    return environ.get(MARKER, str(pid)) != str(pid) and not joins(environ)
