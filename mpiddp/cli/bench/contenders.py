"""Who all-reduces: mpiddp, its peers, and one local ``x.add_(y)``, which no all-reduce should be far above.

A contender turns tensors into calls on them, one each. Every tensor is zeroed before its block, outside the timed part:
so its pages are there, and sums stay zero however often they are taken.

What is left in the caches decides more at 4 MiB than who all-reduces (a local ``x.add_(y)``: 0.07 ms with both in a
32 MiB cache, 0.39 ms with neither). So from the size on at which one call makes a block, each rank overwrites a
``sweep`` larger than the last cache before the clock starts, and everybody finds tensors in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ...errors import CollectiveError
from ...op import Sum
from ...ops import allreduce_, empty
from .place import Place
from .timing import Timed

__all__ = ["LOCAL", "PEERS", "Contender", "block_of", "check", "gloo", "library", "local", "own", "shared"]

#: What ``--peers`` may name.
PEERS = ("gloo", "mpi")

#: What nobody's all-reduce should be far above.
LOCAL = "x.add_(y)"

_CPU = torch.device("cpu")

#: dtypes that MPI itself reduces, by torch's name, as mpi4py names them. 16-bit floats it cannot add.
_MPI_TYPES = {
    "float32": "FLOAT",
    "float64": "DOUBLE",
    "complex64": "C_FLOAT_COMPLEX",
    "complex128": "C_DOUBLE_COMPLEX",
    "int8": "INT8_T",
    "int16": "INT16_T",
    "int32": "INT32_T",
    "int64": "INT64_T",
    "uint8": "UINT8_T",
}


@dataclass(frozen=True)
class Contender:
    """``call(tensor)`` is a call that all-reduces it, in place, by a sum; ``op`` is what the table says it does.

    Each call of a block gets a tensor of its own; ``is_fresh``: made for it alone, otherwise the same in every block.
    ``make(numel, dtype=...)`` allocates them.
    """

    name: str
    call: Callable[[torch.Tensor], Callable[[], object]]
    op: str = "sum"
    is_fresh: bool = True
    make: Callable[..., torch.Tensor] = torch.empty


def own(device: torch.device = _CPU) -> Contender:
    """``mpiddp.allreduce_`` of a tensor that it has never seen."""
    return Contender("mpiddp", lambda tensor: partial(allreduce_, tensor, op=Sum), make=_on(torch.empty, device))


def shared(device: torch.device = _CPU) -> Contender:
    """The same of a tensor of ``mpiddp.empty``, in memory that the node's ranks share; one for all calls of a size."""
    return Contender("mpiddp shared", own().call, is_fresh=False, make=_on(empty, device))


def gloo(device: torch.device = _CPU) -> Contender:
    """``torch.distributed.all_reduce`` of its default process group."""
    return Contender("gloo", lambda tensor: partial(dist.all_reduce, tensor), make=_on(torch.empty, device))


def _on(make: Callable[..., torch.Tensor], device: torch.device) -> Callable[..., torch.Tensor]:
    return partial(make, device=device)


def library(place: Place, dtype: torch.dtype) -> Contender | None:
    """The MPI library's own MPI_Allreduce, in place, on a communicator of its own; None for a dtype it cannot add."""
    from mpi4py import MPI

    name = _MPI_TYPES.get(str(dtype).removeprefix("torch."))
    if name is None:
        return None
    datatype, comm = getattr(MPI, name), place.comm.Dup()

    def call(tensor: torch.Tensor) -> Callable[[], object]:
        memory = MPI.memory.fromaddress(tensor.data_ptr(), tensor.nbytes)
        return partial(_keep, tensor, comm.Allreduce, MPI.IN_PLACE, [memory, tensor.numel(), datatype])

    return Contender("MPI_Allreduce", call)


def _keep(tensor: torch.Tensor, run: Callable[..., object], *arguments: Any) -> None:
    """Run a call that knows only the address of ``tensor``, which must live that long."""
    run(*arguments)


def local(device: torch.device = _CPU) -> Contender:
    """One ``x.add_(y)`` on each rank, all at the same time, and no exchange."""

    def call(tensor: torch.Tensor) -> Callable[[], object]:
        return partial(tensor.add_, torch.empty_like(tensor).zero_())

    return Contender(LOCAL, call, op="add", make=_on(torch.empty, device))


def block_of(contender: Contender, numel: int, dtype: torch.dtype, calls: int, sweep: torch.Tensor | None) -> Timed:
    """What timing.py takes: each time a block of ``calls`` calls, and one ahead of them, on tensors of ``numel`` zeros;
    ``sweep`` as above."""
    kept: list[torch.Tensor] = []

    def block() -> Sequence[Callable[[], object]]:
        tensors = kept or [contender.make(numel, dtype=dtype) for _ in range(calls + 1)]
        if not contender.is_fresh:
            kept[:] = tensors
        ready = [contender.call(tensor.zero_()) for tensor in tensors]
        if sweep is not None:
            sweep.add_(1)  # not zero_(): storing alone may go past the caches
        return ready

    return Timed(contender.name, block)


def check(contender: Contender, place: Place, numel: int, dtype: torch.dtype) -> None:
    """All-reduce once and compare with the sum; raises CollectiveError when it is another. Collective.

    Rank r contributes (i + r) % 3 at position i, so that the sum is exact in every dtype up to some hundred ranks.
    """
    tensor = contender.make(numel, dtype=dtype).copy_(_thirds(numel, dtype, torch.arange(3) + place.rank))
    contender.call(tensor)()
    tensor = tensor.cpu()
    residues = torch.stack([(torch.arange(3) + rank) % 3 for rank in range(place.size)]).sum(0)
    expected = residues.to(dtype).repeat(numel // 3 + 1)[:numel]
    wrong = (tensor != expected).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise CollectiveError(
            f"the sum by {contender.name} of {numel} x {dtype} over {place.size} ranks is wrong at {len(wrong)} "
            f"places: on rank {place.rank} element {at} is {tensor[at].item()}, it should be {expected[at].item()}"
        )


def _thirds(numel: int, dtype: torch.dtype, start: torch.Tensor) -> torch.Tensor:
    return (start % 3).to(dtype).repeat(numel // 3 + 1)[:numel].contiguous()
