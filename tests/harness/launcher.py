"""Which MPI this environment has, and how a job is started with it."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["Launcher", "find", "rank_of"]

# Open MPI refuses to run as root unless told twice; PRRTE is the launcher of Open MPI 5.
ROOT_PERMISSION = {
    f"{prefix}_ALLOW_RUN_AS_ROOT{suffix}": "1" for prefix in ("OMPI", "PRTE") for suffix in ("", "_CONFIRM")
}
# With more ranks than cores a spinning rank must give its core away: without this 4 bytes took 4 ms.
RANK_ENVIRONMENT = {"OMPI_MCA_mpi_yield_when_idle": "1", "OMP_NUM_THREADS": "1"}


@dataclasses.dataclass(frozen=True)
class Launcher:
    """An ``mpirun`` and what is known of it: ``flavour`` is "open mpi", "mpich" or "intel mpi"."""

    mpirun: Path
    flavour: str
    version: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.flavour} {'.'.join(map(str, self.version))} ({self.mpirun})"

    def command(self, n: int, program: Sequence[str], arguments: Sequence[str] = ()) -> list[str]:
        """The command line for ``n`` ranks of ``program``; ``arguments`` are more of the launcher's own."""
        flags = ["--oversubscribe", "--bind-to", "none"] if self.flavour == "open mpi" else []
        return [str(self.mpirun), *flags, "-n", str(n), *arguments, *program]

    def environ(self, base: Mapping[str, str]) -> dict[str, str]:
        """``base`` with what a test job needs: root's permission, one thread a rank, idle ranks that yield."""
        return {**base, **ROOT_PERMISSION, **RANK_ENVIRONMENT}


def find(directory: str | None = None, path: str | None = None) -> Launcher | None:
    """The launcher under ``directory`` (or its ``bin``), else beside this Python, else the first on ``path``."""
    if directory is not None:
        places = [Path(directory).absolute() / "bin", Path(directory).absolute()]
    else:
        searched = path if path is not None else os.environ.get("PATH", os.defpath)
        places = [Path(sys.prefix) / "bin", *(Path(p) for p in searched.split(os.pathsep) if p)]
    for place in places:
        for name in ("mpirun", "mpiexec"):
            found = shutil.which(name, path=str(place))
            launcher = identify(Path(found)) if found else None
            if launcher is not None:
                return launcher
    return None


def identify(mpirun: Path) -> Launcher | None:
    """What ``mpirun --version`` says it is; None for a launcher that this file does not know."""
    answer = subprocess.run(
        [str(mpirun), "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, **ROOT_PERMISSION},
    )  # fmt: skip
    return parse_version(mpirun, answer.stdout + answer.stderr)


def parse_version(mpirun: Path, text: str) -> Launcher | None:
    """The launcher that announces itself with ``text``."""
    patterns = (
        ("open mpi", r"Open ?MPI\)? v?(\d[\d.]*)"),
        ("intel mpi", r"Intel\(R\) MPI Library.*?Version (\d[\d.]*)"),
        ("mpich", r"HYDRA build details:\s+Version:\s+(\d[\d.]*)"),
    )
    for flavour, pattern in patterns:
        match = re.search(pattern, text)
        if match:
            return Launcher(mpirun, flavour, tuple(int(part) for part in match[1].strip(".").split(".")))
    return None


def rank_of(environ: Mapping[str, str]) -> int | None:
    """The rank that the launcher gave this process, known before MPI starts; None outside a job."""
    for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"):
        if name in environ:
            return int(environ[name])
    return None
