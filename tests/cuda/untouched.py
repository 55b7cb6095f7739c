"""A job on ranks whose device memory is the stand-in's: any touch of it by the CPU kills the rank.

Collectives run as they do on GPUs, over MPI and between real processes, by the way that the argument names. Torch has
no GPU here, so CPU tensors over the forbidden addresses stand for device tensors; copies, and what would be kernels, go
by the stand-in's driver.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

import mpiddp
from mpiddp import runtime
from mpiddp.collectives import ReduceOp, cuda_ipc, device_reduction, select
from mpiddp.dtypes import scale_
from mpiddp.engine.device import crossing
from mpiddp.memory.ipc import Libcuda, PeerMemory
from mpiddp.transport.device import CUDA_AWARE, STAGED, Ways

NUMEL = 3_000_017


class Done:
    """Streams and events of a device on which everything is done at once."""

    def record_event(self) -> Done:
        return self

    def wait_event(self, event: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    synchronize = record_event


class StandInDriver:
    """As mpiddp.memory.streams.Driver."""

    def __init__(self, cuda: Libcuda) -> None:
        self.cuda = cuda

    def current(self, device: torch.device) -> Done:
        return Done()

    make_stream = current

    def on(self, stream: Done) -> Any:
        return nullcontext()

    def is_capturing(self, device: torch.device) -> bool:
        return False

    def keep(self, tensor: torch.Tensor, stream: Done) -> None:
        pass

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.cuda._call(
            "cuMemcpyAsync",
            ctypes.c_uint64(target.data_ptr()),
            ctypes.c_uint64(source.data_ptr()),
            ctypes.c_size_t(source.nbytes),
            None,
        )

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def put(self, values: torch.Tensor) -> torch.Tensor:
        address = self.cuda.allocate(values.nbytes)
        tensor = over(address, values.nbytes).view(values.dtype)
        self.copy(values, tensor)
        return tensor

    def get(self, tensor: torch.Tensor) -> torch.Tensor:
        values = torch.empty(tensor.shape, dtype=tensor.dtype)
        self.copy(tensor, values)
        return values


def over(address: int, nbytes: int) -> torch.Tensor:
    """A CPU tensor of bytes that may not be touched."""
    return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8)


class StandInMemory(PeerMemory):
    """Tensors over the stand-in's addresses."""

    def _over(self, raw: Any, ordinal: int) -> torch.Tensor:
        described = raw.__cuda_array_interface__
        tensor = over(raw.address, described["shape"][0])
        tensor._raw = raw  # type: ignore[attr-defined]
        return tensor

    def empty(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        nbytes = numel * dtype.itemsize
        return over(self.block(nbytes, 0).address, nbytes).view(dtype)

    def address(self, record: bytes, ordinal: int | None) -> int:
        return super().address(record, 0)


def main(way: str) -> None:
    mpiddp.init()
    rank, size = mpiddp.rank(), mpiddp.size()
    driver = StandInDriver(Libcuda())
    lane = runtime.current().channel.lane()
    ways: Any = Ways(lambda _: CUDA_AWARE if way == "cuda-aware" else STAGED, driver)
    ways.can_map, ways.memory = way == "ipc", StandInMemory(driver.cuda)
    lane.link.ways = ways  # type: ignore[misc]
    replace_kernels(driver)

    def values(member: int) -> torch.Tensor:
        return (torch.arange(NUMEL) % 5 + member).to(torch.float32)

    def run(name: str, start: Any) -> torch.Tensor:
        flat = driver.put(values(rank))
        passage = ways.devices.depart(flat)

        def cross(link: Any, tag: int) -> Any:
            return crossing(link, flat, passage, lambda link, flat: start(link, flat, tag))

        runtime.current().engine.wait(lane.launch(name, cross))
        return driver.get(flat)

    total = sum((values(member) for member in range(size)), torch.zeros(NUMEL))
    assert torch.equal(run("sum", lambda link, f, tag: select.allreduce(link, f, ReduceOp.SUM, tag)), total)
    assert torch.equal(run("broadcast", lambda link, f, tag: select.broadcast(link, f, 1, tag)), values(1))
    counts = list((ctypes.c_ulong * 4).in_dll(driver.cuda._library, "standin_counts"))
    assert (ways.pinned.kept_nbytes > 0) == (way == "staged"), "another way was taken"
    if way == "ipc":
        assert ways.mapped and counts[3] >= size - 1, (ways.mapped, counts)
    print(f"untouched {way} rank {rank}", flush=True)


def replace_kernels(driver: StandInDriver) -> None:
    """What runs on the device as kernels: reductions, new memory, and copies within it."""

    def reduce_parts(op: ReduceOp, parts: Sequence[Any], outs: Sequence[Any], scale: float = 1.0) -> None:
        total = driver.get(parts[0])
        for part in parts[1:]:
            op.combine(total, driver.get(part), out=total)
        for out in outs:
            driver.copy(scale_(total, scale), out)

    def combine(self: ReduceOp, first: Any, second: Any, out: Any) -> None:
        if driver.cuda._library.cuMemGetAddressRange_v2(None, None, ctypes.c_uint64(out.data_ptr())):
            real_combine(self, first, second, out)
        else:
            reduce_parts(self, [first, second], [out])

    real_combine = ReduceOp.combine
    ReduceOp.combine = combine  # type: ignore[method-assign]
    device_reduction.reduce_parts = cuda_ipc.reduce_parts = reduce_parts  # type: ignore[assignment]
    make = torch.Tensor.new_empty
    torch.Tensor.new_empty = lambda self, *shape: (  # type: ignore[assignment,method-assign]
        make(self, *shape)
        if driver.cuda._library.cuMemGetAddressRange_v2(None, None, ctypes.c_uint64(self.data_ptr()))
        else driver.put(torch.empty(*shape, dtype=self.dtype))
    )
    torch.Tensor.copy_ = lambda self, other, *_: driver.copy(other, self) or self  # type: ignore[assignment,method-assign,func-returns-value]


if __name__ == "__main__":
    main(sys.argv[1])
