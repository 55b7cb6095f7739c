"""Every algorithm through shared memory equals the naive one, with tensors that the ranks share, that they do not, and
both at once."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch

from mpiddp.collectives import ReduceOp, chunk_bounds, mapped, select, shared_memory, shared_rounds
from mpiddp.dtypes import REDUCIBLE, SIXTEEN_BIT
from mpiddp.transport import depth
from mpiddp.transport.node import Node
from tests.collectives.test_allreduce import ORDERED, contribution, expected
from tests.simulated_node import nodes, on_node
from tests.simulation import Deadlock

OPS = [op for op in ReduceOp if op is not ReduceOp.ADASUM]
WAYS = ("shared", "private", "mixed")


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("dtype", sorted({*SIXTEEN_BIT, torch.float32, torch.uint8}, key=str))
def test_long_tensors_in_their_own_memory_are_averaged(size: int, dtype: torch.dtype) -> None:
    """In blocks as large as there are, with a factor: what is reduced must fit where it is reduced."""
    numel = (9 << 20) // dtype.itemsize + 3
    tensors = [torch.full((numel,), 2.0 * (rank + 1)).to(dtype) for rank in range(size)]
    on_node(members(size), lambda link: shared_memory.allreduce(link.node, tensors[link.rank], ReduceOp.SUM, 0, 0.5))
    assert all(bool((tensor == size * (size + 1) / 2).all()) for tensor in tensors)


@functools.cache
def members(size: int) -> list[Node]:
    return nodes(size)


@pytest.fixture(params=[False, True], ids=["one block", "many blocks"])
def many_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of a few elements, so that short tensors have many."""
    if request.param:
        monkeypatch.setattr(mapped, "BLOCK_NBYTES", 128)
        monkeypatch.setattr(shared_rounds, "BLOCK_NBYTES", 128)
        monkeypatch.setattr(shared_memory, "STAGED_NBYTES", 256)
        monkeypatch.setattr(shared_rounds, "STAGED_NBYTES", 256)
        monkeypatch.setattr(shared_memory, "LONG_STAGED_NBYTES", 512)
        monkeypatch.setattr(shared_memory, "_LONG_NBYTES", 4096)
        monkeypatch.setattr(depth, "SHALLOW_NBYTES", 1024)
        monkeypatch.setattr(depth, "DEEP_NBYTES", 4096)
        monkeypatch.setattr(shared_memory, "DIRECT_NBYTES", 64)
        monkeypatch.setattr(shared_memory, "STAGED_READ_NBYTES", 4096)
    yield


def placed(node: Node, content: torch.Tensor, way: str) -> torch.Tensor:
    """A copy of ``content`` in memory of one kind or the other."""
    if way == "private" or (way == "mixed" and node.rank % 2):
        return content.clone()
    return node.memory.segments.empty(content.shape, content.dtype).copy_(content)


def check(size: int, numel: int, dtype: torch.dtype, op: ReduceOp, scale: float, way: str, seed: int = 0) -> None:
    flats = [placed(node, contribution(node.rank, numel, dtype), way) for node in members(size)]
    tag = seed % 24576
    on_node(members(size), lambda link: select.allreduce(link, flats[link.rank], op, tag, scale), seed)
    want = expected(size, numel, dtype, op, scale)
    for rank, flat in enumerate(flats):
        assert torch.equal(flat, want), f"{way}, rank {rank} of {size}, {numel} x {dtype}, {op.name}"


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("way", WAYS)
def test_every_length(way: str, size: int) -> None:
    for numel in (0, 1, 2, size - 1, size, size + 1, 17, 64, 101, 1031):
        check(size, numel, torch.float32, ReduceOp.SUM, 1.0, way, seed=numel)


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("dtype", sorted(REDUCIBLE, key=str), ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_op_and_dtype(op: ReduceOp, dtype: torch.dtype) -> None:
    if dtype not in ORDERED and op in (ReduceOp.MIN, ReduceOp.MAX):
        return
    for size in (2, 3, 5):
        for way in WAYS:
            check(size, 203, dtype, op, 1.0, way)


@pytest.mark.parametrize("op", [ReduceOp.MIN, ReduceOp.MAX])
def test_bool(op: ReduceOp) -> None:
    check(3, 700, torch.bool, op, 1.0, "shared")


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("dtype", sorted(SIXTEEN_BIT | {torch.float32, torch.int32}, key=str), ids=str)
def test_scale_is_applied_once(dtype: torch.dtype) -> None:
    for size in (1, 2, 3, 4):
        for way in WAYS:
            check(size, 229, dtype, ReduceOp.SUM, 0.5, way)


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("way", WAYS)
def test_16_bit_floats_are_summed_in_float32_and_rounded_once(way: str) -> None:
    """60000 + 60000 is too large for float16, their average is not; 256 + 0.5 + 0.5 shows where bfloat16 rounds."""
    for size in (2, 4):
        flats = [placed(node, torch.full((300,), 60000.0, dtype=torch.float16), way) for node in members(size)]
        on_node(
            members(size), lambda link, f=flats, s=size: select.allreduce(link, f[link.rank], ReduceOp.SUM, 3, 1 / s)
        )
        assert all((flat == 60000).all() for flat in flats)
    flats = [placed(n, torch.full((300,), 1.0 if n.rank else 256.0).bfloat16(), way) for n in members(3)]
    on_node(members(3), lambda link: select.allreduce(link, flats[link.rank], ReduceOp.SUM, 4))
    assert all((flat == 258).all() for flat in flats)


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("way", WAYS)
def test_all_ranks_get_the_same_bits(way: str) -> None:
    for size in range(2, 9):
        data = [torch.randn(450, generator=torch.Generator().manual_seed(r)) * 10.0**r for r in range(size)]
        data[0][:2], data[1][:2] = torch.tensor([0.0, float("nan")]), torch.tensor([-0.0, 1.0])
        for op in OPS:
            flats = [placed(node, content, way) for node, content in zip(members(size), data, strict=True)]
            on_node(members(size), lambda link, f=flats, o=op: select.allreduce(link, f[link.rank], o, 0, 1 / 3))
            assert len({flat.numpy().tobytes() for flat in flats}) == 1, f"{size} ranks, {op.name}"


@pytest.mark.usefixtures("many_blocks")
def test_many_schedules_and_tags() -> None:
    for seed in range(120):
        check(2 + seed % 6, 37 * (seed % 9), torch.float64, ReduceOp.SUM, 1.0, WAYS[seed % 3], seed * 331)


@pytest.mark.usefixtures("many_blocks")
def test_several_exchanges_at_once() -> None:
    """Those of different tags overlap; those that share a slot run one after the other, in the order of their start."""
    size = 3
    tags = [5, 8192, 9000, 5 + 32, 8192 + 16, 5 + 64, 8703]
    flats = [
        [placed(node, torch.full((333,), tag, dtype=torch.float64), "mixed") for tag in tags] for node in members(size)
    ]

    def all_of_them(link):  # type: ignore[no-untyped-def]
        running = [
            select.allreduce(link, flat, ReduceOp.SUM, tag) for flat, tag in zip(flats[link.rank], tags, strict=True)
        ]
        while running:
            for steps in list(running):
                if next(steps, "ended") == "ended":
                    running.remove(steps)
            yield link.network.random.random()

    for seed in range(10):
        on_node(members(size), all_of_them, seed)
    for flat, tag in zip(flats[1], tags, strict=True):
        assert (flat == tag * float(size) ** 10).all()


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("way", WAYS)
def test_reduce_scatter_and_allgather(way: str, size: int) -> None:
    for numel in (0, 3, 40, 41, 1501):
        for dtype in (torch.float32, torch.bfloat16):
            bounds = chunk_bounds(numel, size)
            flats = [placed(node, contribution(node.rank, numel, dtype), way) for node in members(size)]
            on_node(
                members(size),
                lambda link, f=flats, b=bounds: select.reduce_scatter(link, f[link.rank], b, ReduceOp.SUM, 1, 2.0),
                seed=numel,
            )
            want = expected(size, numel, dtype, ReduceOp.SUM, 2.0)
            for rank, (lo, hi) in enumerate(bounds):
                assert torch.equal(flats[rank][lo:hi], want[lo:hi])
                flats[rank][:lo] = flats[rank][hi:] = -1
            on_node(members(size), lambda link, f=flats, b=bounds: select.allgather(link, f[link.rank], b, 1), numel)
            assert all(torch.equal(flat, want) for flat in flats)


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("way", WAYS)
def test_broadcast(way: str, size: int) -> None:
    for root in range(size):
        for numel in (0, 1, 700):
            flats = [placed(node, torch.full((numel,), float(node.rank)), way) for node in members(size)]
            on_node(members(size), lambda link, f=flats, r=root: select.broadcast(link, f[link.rank], r, 5), root)
            assert all((flat == root).all() for flat in flats)


@pytest.mark.usefixtures("many_blocks")
@pytest.mark.parametrize("size", range(1, 9))
def test_alltoall(size: int) -> None:
    """Rank i sends rank j (i + 2 j) % 5 elements, some of them many times as many."""
    for factor in (1, 40):
        counts = [[(i + 2 * j) % 5 * factor for j in range(size)] for i in range(size)]
        sources = [torch.cat([torch.full((n,), 10.0 * i + j) for j, n in enumerate(counts[i])]) for i in range(size)]
        targets = [torch.empty(sum(counts[i][j] for i in range(size))) for j in range(size)]
        on_node(
            members(size),
            lambda link, c=counts, s=sources, t=targets: select.alltoall(
                link,
                s[link.rank],
                bounds_of(c[link.rank]),
                t[link.rank],
                bounds_of([row[link.rank] for row in c]),
                7,
            ),
            seed=factor,
        )
        for j, target in enumerate(targets):
            want = torch.cat([torch.full((counts[i][j],), 10.0 * i + j) for i in range(size)])
            assert torch.equal(target, want)


def bounds_of(lengths: list[int]) -> list[tuple[int, int]]:
    return [(sum(lengths[:at]), sum(lengths[: at + 1])) for at in range(len(lengths))]


def test_a_rank_that_never_comes_is_waited_for() -> None:
    def steps(link):  # type: ignore[no-untyped-def]
        if link.rank:
            yield from select.allreduce(link, torch.ones(3), ReduceOp.SUM, 2)

    with pytest.raises(Deadlock):
        on_node(nodes(3), steps)


def test_the_choice_is_pure_and_can_be_overridden() -> None:
    assert select.allreduce_by(1 << 20, is_shared=True) == "shared_memory"
    assert select.allreduce_by(1 << 20, is_shared=False, wanted="shared_memory") == "ring"
    assert select.allreduce_by(1 << 20, is_shared=True, wanted="ring") == "ring"
    assert select.allreduce_by(100, is_shared=False) == "doubling"
