"""Every all-reduce algorithm equals the naive one, at every size, length, op and dtype, in the simulated world."""

from __future__ import annotations

import functools

import pytest
import torch

from mpiddp.collectives import ReduceOp, chunk_bounds, doubling, naive, ordered, ring, tree
from mpiddp.dtypes import REDUCIBLE, SIXTEEN_BIT, scale_
from tests.simulation import on_all

ALGORITHMS = {
    "ring": ring.allreduce,
    "ring, small segments": functools.partial(ring.allreduce, segment_nbytes=16),
    "doubling": doubling.allreduce,
    "naive": naive.allreduce,
    "ordered": ordered.allreduce,
    "ordered, small segments": functools.partial(ordered.allreduce, segment_nbytes=16),
}
OPS = [op for op in ReduceOp if op is not ReduceOp.ADASUM]
ORDERED = sorted((d for d in REDUCIBLE if not d.is_complex), key=str)


def contribution(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Small integers, so that sums are exact in every dtype and any order."""
    generator = torch.Generator().manual_seed(1000 * rank + numel)
    return torch.randint(0, 3, (numel,), generator=generator).to(dtype)


def expected(size: int, numel: int, dtype: torch.dtype, op: ReduceOp, scale: float) -> torch.Tensor:
    result = contribution(0, numel, dtype)
    for rank in range(1, size):
        op.combine(result, contribution(rank, numel, dtype), out=result)
    return scale_(result, scale)


def check(name: str, size: int, numel: int, dtype: torch.dtype, op: ReduceOp, scale: float, seed: int = 0) -> None:
    flats = [contribution(rank, numel, dtype) for rank in range(size)]
    on_all(size, lambda link: ALGORITHMS[name](link, flats[link.rank], op, tag=3, scale=scale), seed)
    want = expected(size, numel, dtype, op, scale)
    for rank, flat in enumerate(flats):
        assert torch.equal(flat, want), f"{name}, rank {rank} of {size}, {numel} x {dtype}, {op.name}"


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_length(name: str, size: int) -> None:
    for numel in (0, 1, 2, size - 1, size, size + 1, 17, 64, 101):
        check(name, size, numel, torch.float32, ReduceOp.SUM, 1.0, seed=numel)


@pytest.mark.parametrize("dtype", ORDERED, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_op_and_dtype(name: str, op: ReduceOp, dtype: torch.dtype) -> None:
    for size in (2, 3, 5):
        check(name, size, 23, dtype, op, 1.0)


@pytest.mark.parametrize("dtype", sorted(SIXTEEN_BIT | {torch.float32, torch.int32}, key=str), ids=str)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_scale_is_applied_once(name: str, dtype: torch.dtype) -> None:
    for size in (1, 2, 3, 4):
        check(name, size, 29, dtype, ReduceOp.SUM, 0.5)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_sums(dtype: torch.dtype) -> None:
    check("ring", 3, 10, dtype, ReduceOp.SUM, 1.0)


@pytest.mark.parametrize("name", ["ring, small segments", "doubling"])
def test_many_schedules(name: str) -> None:
    for seed in range(40):
        check(name, 2 + seed % 6, 37, torch.float64, ReduceOp.SUM, 1.0, seed)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_all_ranks_get_the_same_bits(name: str) -> None:
    """Rounding depends on the order of additions; the replicas must not."""
    for size in range(2, 9):
        flats = [torch.randn(50, generator=torch.Generator().manual_seed(r)) * 10.0**r for r in range(size)]
        for op in OPS:
            copies = [flat.clone() for flat in flats]
            copies[0][:2], copies[1][:2] = torch.tensor([0.0, float("nan")]), torch.tensor([-0.0, 1.0])
            on_all(size, lambda link, c=copies, o=op: ALGORITHMS[name](link, c[link.rank], o, tag=0, scale=1 / 3))
            assert len({copy.numpy().tobytes() for copy in copies}) == 1, f"{name}, {size} ranks, {op.name}"


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_the_ring_sends_no_more_than_it_must(size: int) -> None:
    numel = 40 * size
    network = on_all(size, lambda link: ring.allreduce(link, torch.ones(numel), ReduceOp.SUM, 0, segment_nbytes=16))
    assert network.sent_elements == [2 * numel * (size - 1) // size] * size


@pytest.mark.parametrize("size", range(1, 17))
def test_doubling_takes_a_logarithm_of_steps(size: int) -> None:
    network = on_all(size, lambda link: doubling.allreduce(link, torch.ones(3), ReduceOp.SUM, 0))
    assert max(network.sent_messages) <= (size - 1).bit_length() + 1


@pytest.mark.parametrize("size", range(1, 9))
def test_reduce_scatter_and_allgather(size: int) -> None:
    for numel in (0, 3, 40, 41):
        bounds = chunk_bounds(numel, size)
        flats = [contribution(rank, numel, torch.float32) for rank in range(size)]
        on_all(
            size, lambda link, f=flats, b=bounds: ring.reduce_scatter(link, f[link.rank], b, ReduceOp.SUM, 1, 2.0, 8)
        )
        want = expected(size, numel, torch.float32, ReduceOp.SUM, 2.0)
        for rank, (lo, hi) in enumerate(bounds):
            assert torch.equal(flats[rank][lo:hi], want[lo:hi])
            flats[rank][:lo] = flats[rank][hi:] = -1
        on_all(size, lambda link, f=flats, b=bounds: ring.allgather(link, f[link.rank], b, 1, 8))
        assert all(torch.equal(flat, want) for flat in flats)


@pytest.mark.parametrize("size", range(1, 10))
def test_broadcast(size: int) -> None:
    for root in range(size):
        flats = [torch.full((13,), float(rank)) for rank in range(size)]
        on_all(
            size, lambda link, f=flats, r=root: tree.broadcast(link, f[link.rank], r, 5, segment_nbytes=8), seed=root
        )
        assert all(torch.equal(flat, torch.full((13,), float(root))) for flat in flats)


def test_the_barrier_waits_for_the_last() -> None:
    for size in range(2, 9):
        entered: list[int] = []

        def steps(link, entered=entered, size=size):  # type: ignore[no-untyped-def]
            for _ in range(link.network.random.randrange(30)):
                yield
            entered.append(link.rank)
            yield from tree.barrier(link, 9)
            assert len(entered) == size

        on_all(size, steps, seed=size)
