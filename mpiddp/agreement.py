"""Settings and versions that all ranks must share: rank 0's settings hold, and whoever differs is named once.

Environment variables that are set on the first host do not reach the others under an mpirun that starts its daemons
by ssh.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .config import Config
from .errors import LaunchError
from .log import logger
from .version import __version__

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["agree", "compare", "versions"]

#: Versions in which ranks must not differ, since they talk to each other in a format of their own.
_BINDING = "mpiddp"


def versions(mpi_library: str) -> dict[str, str]:
    """What runs on this rank."""
    return {
        "mpiddp": __version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "MPI": mpi_library,
    }


def agree(comm: MPI.Intracomm, config: Config, mpi_library: str) -> Config:
    """The configuration of rank 0, with this rank's own local fields. Collective.

    Raises LaunchError where the ranks run different versions of mpiddp; other differences are logged by rank 0.
    """
    reports = comm.allgather((config.agreed(), versions(mpi_library)))
    differing = compare([settings for settings, _ in reports])
    unlike = compare([found for _, found in reports])
    if differing and comm.rank == 0:
        logger.warning("settings differ between ranks; rank 0's hold everywhere: %s", "; ".join(differing.values()))
    if _BINDING in unlike:
        raise LaunchError(
            f"the ranks run different versions of mpiddp: {unlike[_BINDING]}; install one version on all hosts"
        )
    if unlike and comm.rank == 0:
        logger.warning("versions differ between ranks: %s", "; ".join(unlike.values()))
    return dataclasses.replace(config, **reports[0][0])


def compare(reports: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """For each key on which the reports differ, a sentence with rank 0's value and the ranks that have another."""
    found = {}
    for key, first in reports[0].items():
        others: dict[Any, list[int]] = {}
        for rank, report in enumerate(reports):
            if report.get(key) != first:
                others.setdefault(report.get(key), []).append(rank)
        if others:
            said = ", ".join(f"{value!r} on rank{'s' * (len(r) > 1)} {_ranges(r)}" for value, r in others.items())
            found[key] = f"{key} is {first!r} on rank 0, {said}"
    return found


def _ranges(ranks: Sequence[int]) -> str:
    """``[1, 2, 3, 7]`` as ``1-3, 7``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(lo) if lo == hi else f"{lo}-{hi}" for lo, hi in runs)
