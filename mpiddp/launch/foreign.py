"""Two MPI installations in one job: the launcher of one, the library of the other.

mpi4py takes the libmpi in the environment's own lib before the system's, under the site's mpirun too. The sizes then
agree, but the site's fabric and its tuning are lost, and nothing says so.
"""

from __future__ import annotations

import os
from pathlib import PurePosixPath

from .. import processes

__all__ = ["foreign_launcher", "foreign_launcher_here"]

#: Folders inside an installation: what is left when they are cut off is the installation itself.
_INNER = frozenset({"bin", "sbin", "lib", "lib64", "libexec", "openmpi", "mpich", "hydra", "release", "debug", "mpi"})


def foreign_launcher_here() -> str | None:
    """:func:`foreign_launcher` for this process, after MPI has started."""
    launcher = processes.daemon()
    return foreign_launcher(processes.libmpi_path(), launcher.exe if launcher else None)


def foreign_launcher(libmpi_path: str | None, parent_exe: str | None) -> str | None:
    """A warning with both paths if the launcher's program and the library lie in different installations, else None."""
    if not libmpi_path or not parent_exe or PurePosixPath(parent_exe).name not in processes.LAUNCHERS:
        return None
    if _installation(libmpi_path) == _installation(parent_exe):
        return None
    return (
        f"the launcher {parent_exe} and the MPI library {libmpi_path} belong to different installations: the "
        "launcher's fabric and settings may not be in use. Start with the library's own mpirun, or make mpi4py load "
        "the launcher's library (MPI4PY_LIBMPI=/path/to/libmpi.so); on a cluster a virtual environment should hold no "
        "MPI wheel"
    )


def _installation(path: str) -> PurePosixPath:
    """The prefix that the file is installed under: ``/usr/lib/x86_64-linux-gnu/libmpi.so`` is in ``/usr``."""
    folder = PurePosixPath(os.path.realpath(path)).parent
    while folder.name in _INNER or "-linux-gnu" in folder.name:
        folder = folder.parent
    return folder
