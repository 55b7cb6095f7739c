"""The launcher's step says N ranks and MPI says 1: the commonest way to train N times the same model, unnoticed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from ..errors import LaunchError
from .detect import Launch

__all__ = ["check_size", "is_interactive"]


def check_size(
    launch: Launch, mpi_size: int, environ: Mapping[str, str], library: str, modules: Iterable[str] | None = None
) -> None:
    """Raise :class:`LaunchError` with cause and cure if the launcher started several ranks and MPI knows one.

    ``mpi_size`` is that of MPI's world, ``library`` MPI's own version text, ``modules`` the names of the loaded
    modules. A world that is larger than the launcher says is in order (one of several components of a job; spawned
    ranks).
    """
    said = launch.least_size
    if mpi_size != 1 or said <= 1 or is_interactive(launch, environ, sys.modules if modules is None else modules):
        return
    told = ", ".join(f"{n}={environ[n]}" for n in launch.variables)
    unset = " ".join(f"-u {n}" for n in dict.fromkeys((*launch.variables, "PMIX_RANK", "PMI_RANK")) if n in environ)
    name = library.strip().splitlines()[0].split(",")[0].strip() if library.strip() else "unknown"
    raise LaunchError(
        f"the launcher ({launch.kind}) says {'' if launch.size else 'at least '}{said} ranks, of which this is rank "
        f"{'?' if launch.rank is None else launch.rank} ({told}), but MPI ({name}) says that this process is alone, so "
        f"every rank would train by itself. {_cure(launch, environ, name)}. "
        f"If independent single processes are what you want, start each with `env {unset}`"
    )


def is_interactive(launch: Launch, environ: Mapping[str, str], modules: Iterable[str]) -> bool:
    """A shell or notebook inside a step is its rank 0: what is typed there is alone on purpose.

    The variables are inherited by an srun that is started from there, too; its other ranks are not 0 and raise.
    """
    if "ipykernel" in modules:
        return True
    return launch.rank == 0 and any(n in environ for n in ("SLURM_PTY_PORT", "JPY_PARENT_PID", "JPY_SESSION_NAME"))


def _cure(launch: Launch, environ: Mapping[str, str], library: str) -> str:
    is_open_mpi = "open mpi" in library.lower()
    if launch.kind == "slurm":
        return _cure_slurm(environ.get("SLURM_MPI_TYPE", "none"), is_open_mpi)
    if launch.kind in ("mpich", "intel mpi") and is_open_mpi:
        return (
            f"That mpiexec belongs to {launch.kind} and mpi4py loaded Open MPI: start with Open MPI's mpirun, or make "
            "mpi4py load the launcher's library (MPI4PY_LIBMPI=/path/to/libmpi.so)"
        )
    if launch.kind == "open mpi" and not is_open_mpi:
        return (
            "That mpirun belongs to Open MPI and mpi4py loaded another MPI: start with that MPI's mpiexec, or make "
            "mpi4py load Open MPI's library (MPI4PY_LIBMPI=/path/to/libmpi.so)"
        )
    if launch.kind == "pals":
        return "Start with `mpiexec --pmi=pmix` for Open MPI, `mpiexec --pmi=cray` or none for MPICH"
    if launch.kind == "flux":
        return "Start with `flux run -o pmi=pmix` for Open MPI, `flux run -o pmi=simple` for MPICH"
    if launch.kind == "jsm":
        return "jsrun works with IBM Spectrum MPI: make mpi4py load it (MPI4PY_LIBMPI=/path/to/libmpi_ibm.so)"
    return (
        "The launcher and the library do not belong together, or speak different versions of PMI: `which mpirun` and "
        '`python -c "from mpi4py import MPI; print(MPI.Get_library_version())"` must show one installation'
    )


def _cure_slurm(mpi_type: str, is_open_mpi: bool) -> str:
    wanted = "pmix" if is_open_mpi else "pmi2"
    return (
        f"srun ran with --mpi={mpi_type}: use `srun --mpi={wanted}` (`srun --mpi=list` shows what this Slurm has), or "
        f"in sbatch {'mpirun' if is_open_mpi else 'mpiexec'} in the place of srun"
    )
