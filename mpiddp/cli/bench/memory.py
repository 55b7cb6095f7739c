"""What distributed training needs above local training, in memory.

One way of training a run, since what one leaves behind in a process would be counted for, or hidden from, the next.
The process first trains locally, before MPI and the library are there; its peak is what everything is compared with.
The model is then given up, and freed memory goes back to the kernel. MPI starts, and is made to exchange once: what it
takes is written down apart. Then the same model is trained in the way that is measured. If that is local training once
more, the difference tells how exact all this is.

Memory is PSS: private pages, and of pages that several processes share each one's part. A thread reads it all the time,
so that peaks within backward are seen. The C library is told to take every larger block from the kernel by itself: as a
rule it begins to keep freed ones back once it has seen some, and the later of two equal trainings needed 16 MiB more.
So what the library has it keep (``MPIDDP_HEAP_MB``) does not count either.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ... import config, launch
from ...config import Config
from .gloo import close_gloo, open_gloo
from .models import DDP, LOCAL, MODELS, SHARDED, VARIANTS_OF_MEMORY, Training, can_shard, largest_gradient_nbytes
from .place import arrive, complain, leave
from .sizes import size_text
from .table import Column, Report, Row, number

__all__ = ["COLUMNS", "Peak", "pss_nbytes", "run"]

MIB = 1 << 20
COLUMNS = (
    Column("model", "model", 6, is_left=True),
    Column("optimizer", "optimizer", 9, is_left=True),
    Column("ranks", "ranks", 5),
    Column("way", "way", 14, is_left=True),
    Column("local_MiB", "local MiB", 9, number(1)),
    Column("mpi_MiB", "MPI's MiB", 9, number(1)),
    Column("peak_MiB", "peak MiB", 9, number(1)),
    Column("above_MiB", "above local and MPI", 19, number(1)),
    Column("largest_gradient_MiB", "largest gradient", 16, number(1)),
)

STEPS = 20
_SAMPLE_S = 0.001
_MPI_EXCHANGE_NBYTES = 4 * MIB
#: mallopt()'s name for the size from which a block is mapped by itself, and that size.
_M_MMAP_THRESHOLD, _MAPPED_NBYTES = -3, 128 << 10


def pss_nbytes(rollup: Path = Path("/proc/self/smaps_rollup")) -> int:
    """This process's proportional set size. Raises OSError where the kernel does not tell (before Linux 4.14)."""
    for text in rollup.read_text().splitlines():
        if text.startswith("Pss:"):
            return int(text.split()[1]) << 10
    raise OSError(f"{rollup} has no line of Pss")


class Peak:
    """Within it, a thread takes this process's PSS about every millisecond; ``nbytes`` is the largest it saw."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mpiddp-bench-memory", daemon=True)

    def _watch(self) -> None:
        while not self._over.wait(_SAMPLE_S):
            self.nbytes = max(self.nbytes, pss_nbytes())

    def __enter__(self) -> Peak:
        self.nbytes = pss_nbytes()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self.nbytes = max(self.nbytes, pss_nbytes())

    def __repr__(self) -> str:
        return f"Peak({size_text(self.nbytes)})"


def run(arguments: Namespace) -> int:
    """Measure, and write what ``arguments`` ask for. Collective; returns the exit code."""
    way = VARIANTS_OF_MEMORY[arguments.memory]
    torch.set_num_threads(1)
    _keep_nothing_back()
    local, _ = _peak_of_training(arguments, LOCAL, 0)
    at_rest = _rest()
    _start_mpi()
    mpis = _rest() - at_rest
    place = arrive()
    reason = _why_not(way, place)
    if reason is not None:
        complain(f"{way} cannot be measured: {reason}")
        return 2
    peak, largest = _peak_of_training(arguments, way, place.rank)
    found = {"local": local, "mpi": mpis, "peak": peak, "above": peak - local - mpis, "largest_gradient": largest}
    with Report(COLUMNS, arguments.csv, place.rank == 0) as report:
        report.add(_row(arguments, way, place, found))
    close_gloo()
    leave(place)
    return 0


def _why_not(way: str, place: Any) -> str | None:
    if way == SHARDED and not can_shard():
        return "this DistributedOptimizer takes no shard=True"
    return open_gloo(place) if way == DDP else None


def _peak_of_training(arguments: Namespace, way: str, rank: int) -> tuple[int, int]:
    """The peak while STEPS steps go on, and the size of the largest gradient, in bytes; all is freed again."""
    model = MODELS[(arguments.models or ["mlp"])[0]]
    optimizer = (arguments.optimizers or ["sgd"])[0]
    with Peak() as peak:
        training = Training(model, arguments.width, arguments.batch_size, optimizer, way, rank)
        for _ in range(arguments.rounds or STEPS):
            training.step()
    return peak.nbytes, largest_gradient_nbytes(training.module)


def _start_mpi() -> None:
    """MPI as the library starts it, and one exchange, which makes it allocate what it needs for that."""
    launch.before_mpi(Config.from_environ(config.environ()))
    from mpi4py import MPI

    comm = MPI.COMM_WORLD.Dup()
    data = bytearray(_MPI_EXCHANGE_NBYTES)
    comm.Allreduce(MPI.IN_PLACE, [data, MPI.BYTE], op=MPI.BOR)
    comm.Free()


def _rest() -> int:
    """PSS when nothing goes on, freed memory given back."""
    gc.collect()
    _from_libc("malloc_trim")(0)
    return pss_nbytes()


def _keep_nothing_back() -> None:
    """Have each block of _MAPPED_NBYTES or more mapped by itself, from now on."""
    config.export({"MPIDDP_HEAP_MB": "0"})
    _from_libc("mallopt")(_M_MMAP_THRESHOLD, _MAPPED_NBYTES)


def _from_libc(name: str) -> Callable[..., Any]:
    """A function of glibc; one that does nothing where the C library lacks it."""
    return getattr(ctypes.CDLL(None), name, lambda *_: None)


def _row(arguments: Namespace, way: str, place: Any, found: dict[str, int]) -> Row:
    """The table's row: each value is the largest over the ranks, in MiB."""
    from mpi4py import MPI

    values = {f"{name}_MiB": place.comm.allreduce(nbytes, op=MPI.MAX) / MIB for name, nbytes in found.items()}
    return {
        "model": (arguments.models or ["mlp"])[0],
        "optimizer": (arguments.optimizers or ["sgd"])[0],
        "ranks": place.size,
        "way": way,
        **{name: round(value, 2) for name, value in values.items()},
    }
