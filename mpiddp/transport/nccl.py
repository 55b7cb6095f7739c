"""NCCL among the GPUs of a node, through cupy: an option, ``MPIDDP_LOCAL=nccl``.

NCCL's kernels wait on the device for those of the other ranks. So each rank needs a GPU of its own (NCCL refuses one
that two share), MPI must not be given device memory meanwhile (what it copies could stand behind such a kernel, which
waits for a rank that waits for MPI), and all ranks must enqueue in one order, which ``collectives/nccl.py`` sees to.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..dtypes import name_of
from ..errors import CollectiveError

__all__ = ["UID_NBYTES", "Nccl", "NcclError", "load", "problem", "takes"]

UID_NBYTES = 128

#: NCCL's name for a dtype, in cupy's module. It knows neither 16-bit integers nor complex numbers nor bool.
_DTYPES = {
    "float64": "NCCL_FLOAT64",
    "float32": "NCCL_FLOAT32",
    "float16": "NCCL_FLOAT16",
    "bfloat16": "NCCL_BFLOAT16",
    "int64": "NCCL_INT64",
    "int32": "NCCL_INT32",
    "int8": "NCCL_INT8",
    "uint8": "NCCL_UINT8",
}

#: Its name for a ReduceOp, by that one's.
_OPS = {"SUM": "NCCL_SUM", "MIN": "NCCL_MIN", "MAX": "NCCL_MAX", "PRODUCT": "NCCL_PROD"}


class NcclError(CollectiveError):
    """NCCL failed; its communicator is of no use any more."""


def takes(dtype: torch.dtype, op: str) -> bool:
    """Whether NCCL reduces this dtype by this ReduceOp (its name) as the other ways do. Pure, so that all ranks choose
    alike. Of a NaN and a number its minimum and maximum give the number, so those of floats are not its."""
    return name_of(dtype) in _DTYPES and op in _OPS and not (op in ("MIN", "MAX") and dtype.is_floating_point)


def load() -> Any:
    """``cupy.cuda.nccl``. ImportError where it is missing, or lacks something that is needed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cupy's own words about a missing library: problem() has the cure
        try:
            library = importlib.import_module("cupy.cuda.nccl")
        except ImportError as error:
            raise ImportError(f"cupy is missing: install the extra cuda12 or cuda13 ({error})") from None
    if not library.available:
        raise ImportError("cupy finds no libnccl.so.2: pip install nvidia-nccl-cu12 (or nvidia-nccl-cu13)")
    lacking = [name for name in (*_DTYPES.values(), *_OPS.values()) if not hasattr(library, name)]
    if lacking:
        raise ImportError(f"this cupy's NCCL lacks {', '.join(lacking)}: use cupy 14 or newer")
    return library


def problem(reports: Sequence[tuple[str, str]]) -> str:
    """Why the ranks of a node cannot use NCCL; empty if they can. ``reports[r]``: the UUID of local rank r's GPU, and
    what it lacks. Pure, so that all say the same."""
    users: dict[str, list[int]] = {}
    for rank, (uuid, why) in enumerate(reports):
        if why:
            return f"local rank {rank}: {why}"
        users.setdefault(uuid, []).append(rank)
    shared = [f"local ranks {', '.join(map(str, ranks))} share GPU-{u}" for u, ranks in users.items() if len(ranks) > 1]
    return f"{'; '.join(shared)}, and NCCL needs one each" if shared else ""


class Nccl:
    """A communicator of the ranks of a node, each with one GPU.

    ``library``: what :func:`load` gave; ``stream()``: the handle of the stream on which everything is enqueued.
    ``next`` is the number of the next collective; all ranks enqueue in the order of the numbers. State: belongs to
    whoever pushes.
    """

    def __init__(
        self, library: Any, uid: bytes, size: int, rank: int, device: torch.device, stream: Callable[[], int]
    ) -> None:
        """Blocks until all ranks have come. ``device`` is the calling thread's current one. NcclError if it fails."""
        self._library, self._stream = library, stream
        self.size, self.rank, self.device = size, rank, device
        self.next = 0
        self.error: NcclError | None = None
        self._communicator: Any = self._called("start", lambda: library.NcclCommunicator(size, uid, rank))

    def _called(self, what: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (self._library.NcclError, TypeError) as error:
            self.error = NcclError(f"NCCL failed on local rank {self.rank}, {self.device}, in its {what}: {error}")
            raise self.error from error

    def _code(self, tensor: torch.Tensor) -> int:
        return int(getattr(self._library, _DTYPES[name_of(tensor.dtype)]))

    def all_reduce(self, flat: torch.Tensor, op: str) -> None:
        """``flat`` becomes the reduction over the ranks by the ReduceOp of that name."""
        at, code, kind = flat.data_ptr(), self._code(flat), int(getattr(self._library, _OPS[op]))
        call = self._communicator.allReduce
        self._called(f"all-reduce of {_shown(flat)}", lambda: call(at, at, flat.numel(), code, kind, self._stream()))

    def reduce_scatter(self, flat: torch.Tensor, bounds: Sequence[tuple[int, int]], op: str) -> None:
        """``flat[slice(*bounds[r])]`` becomes the reduction of it on rank r; the others may be overwritten."""
        code, kind, comm = self._code(flat), int(getattr(self._library, _OPS[op])), self._communicator
        begin, own = flat.data_ptr(), flat[slice(*bounds[self.rank])]

        def call() -> None:
            if _are_equal(bounds):  # one kernel's pass
                comm.reduceScatter(begin, own.data_ptr(), own.numel(), code, kind, self._stream())
                return
            self._library.groupStart()
            try:
                for root, (lo, hi) in enumerate(bounds):
                    at = begin + lo * flat.element_size()
                    if lo < hi:
                        comm.reduce(at, at, hi - lo, code, kind, root, self._stream())
            finally:
                self._library.groupEnd()

        self._called(f"reduce-scatter of {_shown(flat)}", call)

    def all_gather(self, flat: torch.Tensor, bounds: Sequence[tuple[int, int]]) -> None:
        """Every rank's ``flat[slice(*bounds[r])]`` reaches all ranks. Any dtype."""
        size, comm, code = flat.element_size(), self._communicator, self._library.NCCL_UINT8
        begin, (own_lo, own_hi) = flat.data_ptr(), bounds[self.rank]

        def call() -> None:
            if _are_equal(bounds):
                comm.allGather(begin + own_lo * size, begin, (own_hi - own_lo) * size, code, self._stream())
                return
            self._library.groupStart()
            try:
                for root, (lo, hi) in enumerate(bounds):
                    at = begin + lo * size
                    if lo < hi:
                        comm.broadcast(at, at, (hi - lo) * size, code, root, self._stream())
            finally:
                self._library.groupEnd()

        self._called(f"all-gather of {_shown(flat)}", call)

    def broadcast(self, flat: torch.Tensor, root: int) -> None:
        """``flat`` becomes what it is on ``root``. Any dtype."""
        at, code, call = flat.data_ptr(), self._library.NCCL_UINT8, self._communicator.broadcast
        self._called(f"broadcast of {_shown(flat)}", lambda: call(at, at, flat.nbytes, code, root, self._stream()))

    def check(self) -> None:
        """NcclError if something has failed since it was enqueued."""
        self._called("work on the device", self._communicator.check_async_error)

    def close(self, is_clean: bool) -> None:
        """The communicator's end. ``is_clean``: all ranks have done everything; else what is under way is given up, so
        that nothing waits for a peer that has gone."""
        communicator, self._communicator = self._communicator, None
        if communicator is not None:
            communicator.destroy() if is_clean and self.error is None else communicator.abort()

    def __repr__(self) -> str:
        return f"Nccl(rank {self.rank} of {self.size}, {self.device}, {self.next} enqueued)"


def _shown(flat: torch.Tensor) -> str:
    return f"{flat.numel()} {name_of(flat.dtype)}"


def _are_equal(bounds: Sequence[tuple[int, int]]) -> bool:
    """Whether the ranks' chunks are of one length and side by side from the start, as NCCL's own calls want them."""
    length = bounds[0][1]
    return all(chunk == (rank * length, (rank + 1) * length) for rank, chunk in enumerate(bounds))
