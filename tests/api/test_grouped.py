"""Groups: several tensors as one, all of them or none; and sparse tensors."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from tests.api.oracle import close, everyones, reduced

pytestmark = pytest.mark.ranks(2, 3, 4)

MIXED = [((), torch.float32), ((0,), torch.float64), ((5,), torch.int64), ((2, 3), torch.float16), ((7,), torch.uint8)]


def assert_nothing_is_pending(world: Any) -> None:
    engine = world.runtime.current().engine
    assert engine.wait_until(lambda: not engine.pending(), "silence", timeout_s=10)


def test_a_list_comes_back(world: Any) -> None:
    """Of any length and of mixed shapes and dtypes, in the order of what was given."""
    size, rank = world.size(), world.rank()
    for op in (world.Average, world.Sum, world.Max):
        groups = [everyones(size, shape, dtype, n) for n, (shape, dtype) in enumerate(MIXED)]
        mine = [tensors[rank].clone() for tensors in groups]
        wants = [reduced(world, tensors, op) for tensors in groups]
        for results in (
            world.grouped_allreduce(mine, op=op),
            world.synchronize(world.grouped_allreduce_async(tuple(mine), op=op, name="t")),
            world.grouped_allreduce_(mine, op=op),
        ):
            assert isinstance(results, list) and len(results) == len(mine)
            for result, want in zip(results, wants, strict=True):
                close(result, want)
        for result, tensor in zip(results, mine, strict=True):
            assert result is tensor
    handle = world.grouped_allreduce_async_(mine, op=world.Sum)
    assert all(result is tensor for result, tensor in zip(world.synchronize(handle), mine, strict=True))
    assert world.poll(handle)


def test_many_groups_under_names_in_any_order(world: Any) -> None:
    order = range(12) if world.rank() % 2 else reversed(range(12))
    handles = {}
    for number in order:
        tensors = [torch.full((3,), float(number)), torch.full((2,), 1.0)]
        handles[number] = world.grouped_allreduce_async(tensors, name=f"g{number}", op=world.Sum)
    for number in range(12):
        first, second = world.synchronize(handles[number])
        assert first[0] == number * world.size() and second[0] == world.size()


def test_a_group_runs_when_all_of_it_is_there(world: Any) -> None:
    """A group on the other ranks, and single tensors under the same names here, are no match."""
    tensors = [torch.ones(3), torch.ones(4)]
    if world.rank() == 0:
        time.sleep(0.2)
    handle = world.grouped_allreduce_async_(tensors, op=world.Sum, name="late")
    if world.rank() != 0:
        assert not world.poll(handle) or tensors[0][0] == world.size()
    world.synchronize(handle)
    assert tensors[0][0] == tensors[1][0] == world.size()


def test_gradients_of_a_group(world: Any) -> None:
    """Together, and one result after the other, as scripts do it."""
    size, rank = world.size(), world.rank()
    for op, factor in ((world.Average, 1 / size), (world.Sum, 1.0)):
        tensors = [torch.ones(3, requires_grad=True), torch.ones(2, 2, requires_grad=True), torch.ones(4)]
        results = world.grouped_allreduce(tensors, op=op, prescale_factor=0.5)
        (results[0].sum() * (rank + 1) + results[1].sum()).backward()
        torch.testing.assert_close(tensors[0].grad, torch.full((3,), 0.5 * factor * size * (size + 1) / 2))
        torch.testing.assert_close(tensors[1].grad, torch.full((2, 2), 0.5 * factor * size))
        assert tensors[2].grad is None
    tensors = [torch.ones(3, requires_grad=True) for _ in range(3)]
    for result in world.grouped_allreduce(tensors, compression=world.Compression.fp16):
        result.sum().backward()
    assert all(torch.equal(tensor.grad, torch.ones(3)) for tensor in tensors)


def test_what_a_group_refuses_sends_nothing(world: Any) -> None:
    """A bad tensor anywhere in the list, on all ranks or on one: the name stays free and nobody waits."""
    odd = torch.ones(2, dtype=torch.bool), torch.ones(2, 2).to_sparse(), torch.ones(1, dtype=torch.complex32), "text"
    for number, bad in enumerate(odd):
        for call in (world.grouped_allreduce, world.grouped_allreduce_, world.grouped_allreduce_async):
            if world.rank() == 0 or number % 2:
                good = torch.ones(2)
                with pytest.raises((TypeError, ValueError)):
                    call([good, torch.ones(2), bad], name="refused", op=world.Sum, prescale_factor=2.0)
                assert torch.equal(good, torch.ones(2))
    for bad in odd[1:]:
        with pytest.raises((TypeError, ValueError)):
            world.grouped_allgather([torch.ones(2), bad], name="refused")
        with pytest.raises((TypeError, ValueError)):
            world.grouped_reducescatter([torch.ones(2), bad], name="refused")
    with pytest.raises(ValueError, match="scalar"):
        world.grouped_reducescatter([torch.ones(2), torch.tensor(1.0)], name="refused")
    for empty in (world.grouped_allreduce, world.grouped_allgather, world.grouped_reducescatter):
        with pytest.raises(ValueError, match="at least one"):
            empty([])
    results = world.grouped_allreduce([torch.ones(2), torch.ones(3)], name="refused", op=world.Sum)
    assert [result[0].item() for result in results] == [world.size()] * 2
    assert_nothing_is_pending(world)


def test_a_name_within_a_group_that_is_in_flight(world: Any) -> None:
    if world.rank() == 0:
        handle = world.allreduce_async(torch.ones(2), name="part.1")
        with pytest.raises(ValueError, match=r"'part\.1'"):
            world.grouped_allreduce_async([torch.ones(2), torch.ones(2)], name="part")
        with pytest.raises(ValueError, match=r"'part"):
            world.grouped_allgather_async([torch.ones(2), torch.ones(2)], name="part")
        world.barrier()
    else:
        world.barrier()  # rank 0 has seen it: only now may the first be completed
        handle = world.allreduce_async(torch.ones(2), name="part.1")
    world.synchronize(handle)
    assert world.grouped_allreduce([torch.ones(2), torch.ones(2)], name="part")[1][0] == 1
    assert_nothing_is_pending(world)


@pytest.mark.parametrize("name", ["named", None])
@pytest.mark.parametrize("odd_rank", [0, -1])
@pytest.mark.parametrize("what", ["shape", "dtype", "length"])
def test_a_mismatch_within_a_group(world: Any, name: str | None, odd_rank: int, what: str) -> None:
    """Raises on all ranks, and none of the group is reduced."""
    tensors = [torch.ones(2), torch.ones(3), torch.ones(4)]
    if world.rank() == odd_rank % world.size():
        if what == "shape":
            tensors[1] = torch.ones(5)
        elif what == "dtype":
            tensors[2] = torch.ones(4, dtype=torch.float64)
        else:
            del tensors[2]
    with pytest.raises(world.MismatchError, match="rank"):
        world.grouped_allreduce_(tensors, name=name, op=world.Sum)
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in tensors)
    assert_nothing_is_pending(world)
    assert world.grouped_allreduce([torch.ones(2)], name=name, op=world.Sum)[0][0] == world.size()


# -- sparse ------------------------------------------------------------------------------------------------------------


def sparse(rank: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Row 0 on every rank, a row of its own, and one of them twice."""
    indices = torch.tensor([[0, rank + 1, rank + 1]])
    return torch.sparse_coo_tensor(indices, torch.ones(3, 2, dtype=dtype) * (rank + 1), (6, 2))


def test_sparse_sums_and_averages(world: Any) -> None:
    size, rank = world.size(), world.rank()
    for dtype in (torch.float32, torch.float64, torch.float16):
        total = sum(sparse(r, dtype).to_dense() for r in range(size))
        for op, want in ((world.Sum, total), (world.Average, total / size)):
            collect = world.sparse_allreduce_async(sparse(rank, dtype), f"sparse {dtype}", op)
            assert callable(collect)
            result = collect()
            assert result.is_sparse and result.is_coalesced() and result.dtype == dtype
            close(result.to_dense(), want)


def test_sparse_with_nothing_on_some_ranks(world: Any) -> None:
    size, rank = world.size(), world.rank()
    empty = torch.sparse_coo_tensor(torch.empty(1, 0, dtype=torch.int64), torch.empty(0, 2), (6, 2))
    result = world.sparse_allreduce_async(sparse(0) if rank == 1 else empty, name="some", op=world.Sum)()
    assert torch.equal(result.to_dense(), sparse(0).to_dense())
    result = world.sparse_allreduce_async(empty, name="none", op=world.Average)()
    assert result._nnz() == 0 and result.shape == (6, 2)
    scalar_values = torch.sparse_coo_tensor(torch.tensor([[rank, 0], [0, 1]]), torch.ones(2), (size, 2))
    result = world.sparse_allreduce_async(scalar_values, name="matrix", op=world.Sum)()
    want = torch.zeros(size, 2)
    want[:, 0], want[0, 1] = 1, size
    assert torch.equal(result.to_dense(), want)


def test_sparse_mistakes(world: Any) -> None:
    with pytest.raises(ValueError, match="sparse COO"):
        world.sparse_allreduce_async(torch.ones(3), "dense", world.Sum)
    with pytest.raises(ValueError, match="Average or Sum"):
        world.sparse_allreduce_async(sparse(0), "max", world.Max)
    rows = 7 if world.rank() == 1 else 6
    mine = torch.sparse_coo_tensor(torch.tensor([[rows - 1]]), torch.ones(1, 2), (rows, 2))
    with pytest.raises(world.MismatchError, match=r"rank 1"):
        world.sparse_allreduce_async(mine, "shapes", world.Sum)()
    assert world.sparse_allreduce_async(sparse(0), "shapes", world.Sum)().to_dense()[0, 0] == world.size()
