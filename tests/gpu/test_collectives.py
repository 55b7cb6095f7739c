"""Every public collective on CUDA tensors, by every transport, on ranks that may share one GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mpiddp.collectives import device_reduction
from mpiddp.collectives.base import ReduceOp
from mpiddp.dtypes import REDUCIBLE, SIXTEEN_BIT

pytestmark = [pytest.mark.gpu, pytest.mark.ranks(2, 3, 4, timeout_s=120)]

#: By a whole copy; in one shot, or in the ring; in two shots, or in the ring in several segments.
NUMELS = (1, 1000, 100_003, 3_000_017)


@pytest.fixture(params=["mapped", "staged", "cuda-aware"])
def way(request: pytest.FixtureRequest, world: Any) -> Iterator[str]:
    """Which transport; the last where the job's MPI was started with MPIDDP_CUDA_AWARE=1."""
    from mpiddp import runtime
    from mpiddp.transport.device import CUDA_AWARE, STAGED

    settings, ways = runtime.current().config, runtime.current().channel.link.ways
    if request.param == "cuda-aware" and not settings.cuda_aware:
        pytest.skip("this MPI was not started with MPIDDP_CUDA_AWARE=1")
    before = ways.can_map, ways.mapped, ways.way_to
    if request.param == "mapped":
        assert ways.can_map
    else:
        ways.can_map, ways.mapped = False, None
        ways.way_to = lambda _: CUDA_AWARE if request.param == "cuda-aware" else STAGED
    yield request.param
    if request.param == "mapped":
        assert ways.mapped is not False, "the ranks did not map each other's memory"
    else:
        ways.can_map, ways.mapped, ways.way_to = before


def device(world: Any) -> torch.device:
    return torch.device("cuda", world.local_rank() % torch.cuda.device_count())


def values(rank: int, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.arange(numel) * (rank + 1) % 3 + rank % 2).to(dtype)


def total(size: int, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return sum((values(rank, numel, dtype) for rank in range(size)), torch.zeros(numel, dtype=dtype))


def late(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its content, which comes some 50 ms after this returns."""
    made = torch.zeros_like(tensor)
    torch.cuda._sleep(int(1e8))
    return made.copy_(tensor)


def test_sums_wait_for_what_made_them(world: Any, way: str) -> None:
    rank, size, here = world.rank(), world.size(), device(world)
    with torch.cuda.device(here):
        for numel in NUMELS:
            content = values(rank, numel).to(here)
            summed = world.allreduce(late(content), op=world.Sum)
            assert torch.equal((summed * 1.0).cpu(), total(size, numel)), numel
            with torch.cuda.stream(torch.cuda.Stream(here)):
                handles = [world.allreduce_async(late(content), op=world.Sum, name=f"{i}") for i in range(3)]
                for handle in handles:
                    assert torch.equal((world.synchronize(handle) * 1.0).cpu(), total(size, numel)), numel


def test_every_dtype_and_op(world: Any, way: str) -> None:
    rank, size, here = world.rank(), world.size(), device(world)
    for dtype in sorted(REDUCIBLE, key=str):
        ops = (world.Sum, world.Product) if dtype.is_complex else (world.Sum, world.Product, world.Min, world.Max)
        for op in ops:
            want = values(0, 300_001, dtype)
            for other in range(1, size):
                combine = {"Sum": torch.add, "Product": torch.mul, "Min": torch.minimum, "Max": torch.maximum}
                want = combine[str(op).split(".")[-1].capitalize()](want, values(other, 300_001, dtype))
            result = world.allreduce(values(rank, 300_001, dtype).to(here), op=op)
            assert torch.equal(result.cpu(), want), (dtype, op)


def test_averages_and_sixteen_bits(world: Any, way: str) -> None:
    here = device(world)
    for dtype in (torch.float32, torch.int32, *SIXTEEN_BIT):
        same = values(0, 300_001, dtype)
        assert torch.equal(world.allreduce(same.to(here)).cpu(), same)


def test_the_other_collectives(world: Any, way: str) -> None:
    rank, size, here = world.rank(), world.size(), device(world)
    for rows in (2, 40_000):
        mine = values(rank, (rows + rank) * 5).view(-1, 5)
        gathered = torch.cat([values(r, (rows + r) * 5).view(-1, 5) for r in range(size)])
        assert torch.equal(world.allgather(late(mine.to(here))).cpu(), gathered)
        assert torch.equal(world.broadcast(late(mine[:rows].to(here)), 1).cpu(), values(1, rows * 5).view(-1, 5))
        whole = [values(r, rows * size * 5).view(-1, 5) for r in range(size)]
        sent = world.alltoall(late(whole[rank].to(here)))
        assert torch.equal(sent.cpu(), torch.cat([w[rank * rows : (rank + 1) * rows] for w in whole]))
        shard = world.reducescatter(late(whole[rank].to(here)), op=world.Sum)
        assert torch.equal(shard.cpu(), sum(whole, torch.zeros(()))[rank * rows : (rank + 1) * rows])
    many = world.grouped_allreduce([late(values(rank, n).to(here)) for n in (3, 5000)], op=world.Sum)
    assert [torch.equal(one.cpu(), total(size, n)) for one, n in zip(many, (3, 5000), strict=True)] == [True, True]


def test_memory_that_peers_map(world: Any) -> None:
    """Sums on tensors of mpiddp.empty, and on parts of them, from any stream; freed memory is used again."""
    from mpiddp import runtime

    here, ways = device(world), runtime.current().channel.link.ways
    for numel in (1000, 300_001, 300_001):
        tensor = world.empty(numel + 3, 1, device=here)
        assert tensor.device == here and ways.memory.record(tensor) is not None
        part = tensor[3:].view(-1)
        with torch.cuda.stream(torch.cuda.Stream(here)):
            part.copy_(late(values(world.rank(), numel).to(here)))
            assert torch.equal(world.allreduce_(part, op=world.Sum).cpu(), total(world.size(), numel))
        del tensor, part


def test_a_mismatch_of_devices_names_the_ranks(world: Any) -> None:
    here = device(world) if world.rank() == 0 else torch.device("cpu")
    with pytest.raises(world.MismatchError, match="cuda on rank 0"):
        world.allreduce(torch.ones(3, device=here), name="x")
    assert world.allreduce(torch.ones(1), op=world.Sum).item() == world.size()


def test_a_graph_that_is_captured(world: Any) -> None:
    tensor = torch.ones(8, device=device(world))
    with (
        torch.cuda.device(device(world)),
        pytest.raises(world.MpiddpError, match="CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        world.allreduce_async(tensor)
    assert world.allreduce(tensor, op=world.Sum)[0].item() == world.size()


def test_kernels(world: Any) -> None:
    """Those of cupy equal torch's operations."""
    if not device_reduction.has_kernels():
        pytest.skip("needs cupy")
    with torch.cuda.device(device(world)):
        for name in device_reduction._TYPES:
            dtype = getattr(torch, name)
            ops = (ReduceOp.MAX, ReduceOp.MIN, ReduceOp.SUM, ReduceOp.PRODUCT)
            for op in ops[:2] if name == "bool" else ops:
                for numel, skipped in ((1, 0), (4099, 0), (4099, 1)):
                    whole = [values(k, numel + skipped, dtype) for k in range(3)]
                    parts = [part[skipped:] for part in whole]
                    want, outs = torch.empty_like(parts[0]), [torch.empty_like(whole[0]).cuda() for _ in range(2)]
                    outs = [out[skipped:] for out in outs]
                    device_reduction.reduce_parts(op, parts, [want], 1.0)
                    near = [part.cuda()[skipped:] for part in whole]
                    assert device_reduction._launch(op, near, outs, 1.0), "the kernel does not compile"
                    assert all(torch.equal(out.cpu(), want) for out in outs), (name, op, numel, skipped)
