"""This rank's GPU, as the benchmark uses it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from ... import runtime
from ...memory.streams import Cuda
from .place import Place

__all__ = ["Accelerator", "Marks", "problem"]

#: What enqueued work begins and ends with: one's ``elapsed_time`` to the other is in milliseconds.
Marks = list[tuple[Any, Any]]


def problem(place: Place) -> str | None:
    """Why some rank has no GPU to measure; None where all have one. Collective, the same on all ranks."""
    gpu, why = runtime.current().gpu, ""
    if gpu.index is None:
        why = gpu.seen.why or "the others of its node have them all"
    elif not torch.cuda.is_available():
        why = "the driver shows one, which this PyTorch cannot use"
    reasons = place.comm.allgather(why)
    lacking = [rank for rank, reason in enumerate(reasons) if reason]
    if not lacking:
        return None
    others = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
    return f"--device cuda needs a GPU on every rank; there is none on rank {lacking[0]}{others}: {reasons[lacking[0]]}"


#: Where PyTorch does not tell: no GPU's last cache is larger by much.
_CACHE_NBYTES = 128 << 20


class Accelerator:
    """A device whose work runs beside the host's. State: whose ``Marks`` the library's kernels leave (``watch``)."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.set_device(device)
        self.device, self._cuda = device, Cuda()
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._streams = runtime.current().channel.link.ways.devices.of(torch.empty(0, device=device))

    def wait(self) -> None:
        """Until the device has done everything."""
        torch.cuda.synchronize(self.device)

    def timed(self, call: Callable[[], object], marks: Marks) -> None:
        """``call()``, which enqueues on the current stream, between two marks."""
        stream = torch.cuda.current_stream(self.device)
        began = self._cuda.mark(stream)
        call()
        marks.append((began, self._cuda.mark(stream)))

    def watch(self, marks: Marks | None) -> None:
        """The kernels of the library's exchanges leave their marks here from now on."""
        self._streams.times = marks

    def beside(self) -> AbstractContextManager[Any]:
        """A context whose copies run beside those of the current stream."""
        return torch.cuda.stream(self._side)

    def pinned(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Host memory that the device copies by itself."""
        return torch.zeros(numel, dtype=dtype, pin_memory=True)

    def cache_nbytes(self) -> int:
        """Its last cache."""
        return int(getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", _CACHE_NBYTES))

    def free_nbytes(self) -> int:
        """This rank's share of the memory that is free."""
        return int(torch.cuda.mem_get_info(self.device)[0] // len(runtime.current().gpu.users or (0,)))

    def describe(self) -> str:
        """What it is, the memory bandwidth of its data sheet where the driver tells, and who shares it."""
        properties: Any = torch.cuda.get_device_properties(self.device)
        clock, width = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
        rate = f", {2e3 * clock * width / 8 / 1e9:.0f} GB/s by its data sheet" if clock and width else ""
        users = len(runtime.current().gpu.users)
        shared = f"; {users} ranks share rank 0's and take turns on it" if users > 1 else ""
        return f"{properties.name}, CUDA {torch.version.cuda}{rate}{shared}"
