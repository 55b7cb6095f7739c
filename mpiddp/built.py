"""What this library is made of, as Horovod's scripts ask."""

from __future__ import annotations

import torch

from . import runtime

__all__ = [
    "ccl_built",
    "cuda_built",
    "ddl_built",
    "gloo_built",
    "gloo_enabled",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "rocm_built",
]


def mpi_threads_supported() -> bool:
    """Whether MPI lets every thread in (thread level "multiple"). Raises before ``init()``."""
    return runtime.current().world.thread_level == "multiple"


def mpi_enabled() -> bool:
    """Whether MPI carries the collectives: always."""
    return True


def mpi_built() -> bool:
    """Whether the library can use MPI: always."""
    return True


def gloo_enabled() -> bool:
    """Whether gloo carries the collectives: never."""
    return False


def gloo_built() -> bool:
    """Whether the library can use gloo: no."""
    return False


def nccl_built() -> int:
    """The version of NCCL that the library uses: 0, it uses none."""
    return 0


def ddl_built() -> bool:
    """Whether the library can use IBM's DDL: no."""
    return False


def ccl_built() -> bool:
    """Whether the library can use oneCCL: no."""
    return False


def cuda_built() -> bool:
    """Whether this PyTorch can use CUDA."""
    return torch.version.cuda is not None


def rocm_built() -> bool:
    """Whether this PyTorch can use ROCm."""
    return torch.version.hip is not None
