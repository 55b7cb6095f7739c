"""Process sets: static and dynamic, overlapping, in any order; who may use them; and what is wrong with them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.ranks(2, 3, 4)


@contextmanager
def added(world: Any, *members: list[int]) -> Iterator[list[Any]]:
    """These sets, removed at the end."""
    sets = [world.add_process_set(ranks) for ranks in members]
    yield sets
    for one in sets:
        assert world.remove_process_set(one)


def test_what_a_set_tells(world: Any) -> None:
    size, rank = world.size(), world.rank()
    everyone = world.global_process_set
    assert everyone.process_set_id == 0 and everyone.ranks == list(range(size))
    assert (everyone.size(), everyone.rank(), everyone.included()) == (size, rank, True)
    one = world.ProcessSet([size - 1])
    assert one.process_set_id is None and one.ranks == [size - 1]
    assert (one.size(), one.rank(), one.included()) == (None, None, None)
    assert world.add_process_set(one) is one
    assert one.process_set_id > 0 and one.size() == 1
    assert one.included() is (rank == size - 1) and one.rank() == (0 if rank == size - 1 else None)
    assert "ranks=" in repr(one)
    assert world.remove_process_set(one) is True
    assert one.process_set_id is None and one.included() is None
    assert world.remove_process_set(one) is False
    assert world.remove_process_set(everyone) is False


def test_sets_given_to_init(world: Any) -> None:
    """As a list; and "dynamic", as which every other way works too."""
    size, rank = world.size(), world.rank()
    world.shutdown()
    first, last = world.ProcessSet([0]), world.ProcessSet(list(range(1, size)))
    world.init(process_sets=[first, last])
    assert (first.process_set_id, last.process_set_id) == (1, 2)
    mine = first if rank == 0 else last
    assert world.allreduce(torch.ones(1), op=world.Sum, process_set=mine).item() == mine.size()
    world.shutdown()
    assert first.process_set_id is None and first.included() is None
    with pytest.raises(ValueError, match="init"):
        world.add_process_set([0])
    world.init(process_sets="dynamic")
    with added(world, [1]) as (one,):
        if one.included():
            assert world.allreduce(torch.ones(1), op=world.Sum, process_set=one).item() == 1
    world.shutdown()
    with pytest.raises(ValueError, match=r"process_sets='static'.*dynamic"):
        world.init(process_sets="static")
    world.init()


def test_a_set_from_a_communicator(world: Any) -> None:
    from mpi4py import MPI

    half = MPI.COMM_WORLD.Split(world.rank() % 2)
    mine = world.ProcessSet(half)
    assert mine.ranks == list(range(world.rank() % 2, world.size(), 2))
    half.Free()
    if world.size() > 2:
        for ranks in ([0, 2], [1, 3][: world.size() - 2]):
            theirs = mine if mine.ranks == ranks else world.ProcessSet(ranks)
            assert world.add_process_set(theirs) is theirs
            if theirs.included():
                assert world.allreduce(torch.ones(1), op=world.Sum, process_set=theirs).item() == len(ranks)
            world.remove_process_set(theirs)


def test_wrong_sets(world: Any) -> None:
    size = world.size()
    with added(world, [1, 0] if size > 2 else [1]) as (first,):
        assert first.ranks == sorted(first.ranks)
        for ranks in (first.ranks, list(range(size)), [size], [-1], [0, 0], []):
            with pytest.raises(ValueError, match=r"rank|exists"):
                world.add_process_set(ranks)
        with pytest.raises(ValueError, match="already"):
            world.add_process_set(first)
    assert first.process_set_id is None
    never = world.ProcessSet([0])
    with pytest.raises(ValueError, match="add_process_set"):
        world.allreduce(torch.ones(1), process_set=never)
    with pytest.raises(world.MismatchError, match=r"process set \[0\].*rank 0"):
        world.add_process_set([0] if world.rank() == 0 else [1])
    with added(world, [0]) as (again,):
        assert again.process_set_id is not None


def test_only_members_may_call(world: Any) -> None:
    with added(world, [1]) as (one,):
        tensor = torch.ones(2)
        calls = [
            lambda: world.allreduce(tensor, process_set=one),
            lambda: world.allgather(tensor, process_set=one),
            lambda: world.broadcast(tensor, 1, process_set=one),
            lambda: world.alltoall(tensor, process_set=one),
            lambda: world.reducescatter(tensor, process_set=one),
            lambda: world.grouped_allreduce([tensor], process_set=one),
            lambda: world.barrier(one),
            lambda: world.broadcast_object(3, 1, process_set=one),
        ]
        for call in calls:
            if world.rank() == 1:
                call()
            else:
                with pytest.raises(ValueError, match=rf"rank {world.rank()} is no member.*\[1\]"):
                    call()


def test_every_collective_in_a_set(world: Any) -> None:
    """The set without rank 0; roots are world ranks, everything else counts within the set."""
    size, rank = world.size(), world.rank()
    with added(world, list(range(1, size))) as (rest,):
        if rank > 0:
            count, place = size - 1, rank - 1
            assert (rest.size(), rest.rank()) == (count, place)
            mean = sum(range(1, size)) / count
            where = {"process_set": rest}
            mine = torch.full((3,), float(rank))
            assert torch.allclose(world.allreduce(mine, **where), torch.full((3,), mean))
            assert torch.equal(world.allreduce(mine, op=world.Sum, **where), torch.full((3,), mean * count))
            assert torch.equal(world.allreduce(mine, op=world.Max, **where), torch.full((3,), size - 1.0))
            results = world.grouped_allreduce([mine, mine], op=world.Sum, **where)
            assert results[1][0] == mean * count
            assert world.allgather(torch.tensor([rank]), **where).tolist() == list(range(1, size))
            assert world.allgather(torch.ones(rank), **where).numel() == sum(range(1, size))
            for root in range(1, size):
                assert world.broadcast(mine, root, **where)[0] == root
                assert world.broadcast_object({"rank": rank}, root, **where) == {"rank": root}
            with pytest.raises(ValueError, match=r"root_rank=0"):
                world.broadcast(mine, 0, **where)
            output, received = world.alltoall(torch.full((count,), rank), [1] * count, **where)
            assert output.tolist() == list(range(1, size)) and received.tolist() == [1] * count
            shard = world.reducescatter(torch.arange(2.0 * count), op=world.Sum, **where)
            assert shard.tolist() == [2.0 * place * count, (2.0 * place + 1) * count]
            indices = torch.tensor([[place]])
            sparse = torch.sparse_coo_tensor(indices, torch.ones(1), (count,))
            collect = world.sparse_allreduce_async(sparse, "sparse", world.Sum, rest)
            assert collect().to_dense().tolist() == [1.0] * count
            assert world.any_rank(rank == 1, rest) and world.all_ranks(rank == 1, rest) == (count == 1)
        assert world.allreduce(torch.ones(1), op=world.Sum).item() == size


def test_gradients_in_a_set(world: Any) -> None:
    size, rank = world.size(), world.rank()
    with added(world, list(range(1, size))) as (rest,):
        if rank > 0:
            count = size - 1
            tensor = torch.ones(count, requires_grad=True)
            world.allreduce(tensor, op=world.Sum, process_set=rest).sum().backward()
            world.allgather(tensor, process_set=rest).sum().backward()
            world.broadcast(tensor, 1, process_set=rest).sum().backward()
            world.alltoall(tensor, process_set=rest).sum().backward()
            world.reducescatter(tensor, op=world.Sum, process_set=rest).sum().backward()
            world.grouped_allgather([tensor], process_set=rest)[0].sum().backward()
            assert tensor.grad.tolist() == [count + 1 + (rank == 1) + 1 + count + 1.0] * count


def test_overlapping_sets_in_different_orders(world: Any) -> None:
    """Every pair of ranks is a set; each rank goes through its sets in an order of its own."""
    size, rank = world.size(), world.rank()
    pairs = [list(pair) for pair in itertools.combinations(range(size), 2)]
    if size == 2:
        pairs = [[0], [1]]
    with added(world, *pairs) as sets:
        mine = [one for one in sets if one.included()]
        mine = mine[rank % len(mine) :] + mine[: rank % len(mine)]
        for turn in range(10):
            numel = 50_000 if turn % 2 else 3
            handles = [
                (one, world.allreduce_async(torch.full((numel,), float(rank)), op=world.Sum, process_set=one))
                for one in (mine if turn % 3 else mine[::-1])
            ]
            handle = world.allreduce_async(torch.full((5,), float(rank)), op=world.Sum)
            handles.append((world.global_process_set, handle))
            for one, handle in reversed(handles) if rank % 2 else handles:
                assert world.synchronize(handle)[0] == sum(one.ranks)


def test_blocking_calls_in_a_ring_of_sets(world: Any) -> None:
    """Each rank waits in one set while the others wait in theirs: a chain that must not become a circle."""
    size, rank = world.size(), world.rank()
    if size < 3:
        return
    ring = [sorted([r, (r + 1) % size]) for r in range(size)]
    with added(world, *ring) as sets:
        for turn in range(20):
            own = sorted((one for one in sets if one.included()), key=lambda one: one.process_set_id)
            for one in own:
                name = f"turn {turn}"  # the same name in every set
                result = world.allreduce(torch.tensor([float(rank)]), name=name, op=world.Sum, process_set=one)
                assert result.item() == sum(one.ranks)


def test_one_name_in_several_sets_at_once(world: Any) -> None:
    """Rank 0 submits last: until the others let it, what everybody takes part in is in flight on them for certain."""
    rank, size = world.rank(), world.size()
    with added(world, list(range(1, size)), [0]) as (rest, first):
        if rank == 0:
            other = world.broadcast_async(torch.ones(1), 0, name="same", process_set=first)
            world.barrier()
            everyone = world.allreduce_async(torch.ones(3), name="same", op=world.Sum)
        else:
            everyone = world.allreduce_async(torch.ones(3), name="same", op=world.Sum)
            other = world.allgather_async(torch.ones(1), name="same", process_set=rest)
            with pytest.raises(ValueError, match="'same'"):
                world.allreduce_async(torch.ones(3), name="same")
            world.barrier()
        assert world.synchronize(everyone)[0] == size
        assert world.synchronize(other).numel() == (1 if rank == 0 else size - 1)


def test_a_mismatch_in_a_set_concerns_that_set(world: Any) -> None:
    """The error names world ranks; the others go on."""
    size, rank = world.size(), world.rank()
    if size < 3:
        return
    with added(world, [1, 2], [0]) as (pair, alone):
        handle = world.allreduce_async(torch.ones(3), name="fine", op=world.Sum)
        if rank in (1, 2):
            with pytest.raises(world.MismatchError, match=r"'odd'.*\(1,\) on rank 1; \(2,\) on rank 2"):
                world.allreduce(torch.ones(rank), name="odd", process_set=pair)
            assert world.allreduce(torch.ones(2), name="odd", op=world.Sum, process_set=pair)[0] == 2
        elif rank == 0:
            assert world.allreduce(torch.ones(5), name="odd", process_set=alone)[0] == 1
        assert world.synchronize(handle)[0] == size


def test_a_barrier_waits_for_its_set_alone(world: Any, shared_path: Any) -> None:
    """Rank 0 stays away from the others' barrier; who is in it waits for each member."""
    size, rank = world.size(), world.rank()
    began = time.monotonic()
    with added(world, list(range(1, size)), [0]) as (rest, _):
        flag = shared_path / "over"
        if rank == 0:
            until = time.monotonic() + 20
            while not flag.exists():  # never in a barrier until the others are through theirs
                assert time.monotonic() < until
                time.sleep(0.01)
        else:
            if rank == size - 1:
                time.sleep(0.2)
            world.barrier(rest)
            assert rank == size - 1 or time.monotonic() - began > 0.15
            if rank == 1:
                flag.touch()
        world.barrier()


def test_removing_and_adding_again(world: Any) -> None:
    """Ids are not used again, and a set that is gone says so."""
    seen = set()
    ranks = list(range(1, world.size()))
    for turn in range(5):
        with added(world, ranks) as (rest,):
            assert rest.process_set_id not in seen
            seen.add(rest.process_set_id)
            if rest.included():
                handle = world.allreduce_async(torch.ones(1), name="in flight", op=world.Sum, process_set=rest)
                assert world.synchronize(handle).item() == len(ranks)
        if world.rank() == turn % 2:
            with pytest.raises(ValueError, match="add_process_set"):
                world.allreduce(torch.ones(1), process_set=rest)


def test_functions_in_a_set(world: Any) -> None:
    size, rank = world.size(), world.rank()
    with added(world, list(range(1, size))) as (rest,):
        if rank > 0:
            assert world.broadcast_object([rank], root_rank=size - 1, process_set=rest) == [size - 1]
        assert world.allgather_object(rank) == list(range(size))


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("steps", [0, 2])
def test_an_optimizer_of_a_set_that_is_gone(world: Any, steps: int, shard: bool) -> None:
    """Whoever trains on gets an error that names the set, in place of a wait without end."""
    with added(world, list(range(world.size() - 1)) or [0], [world.size() - 1]) as sets:
        mine = next(one for one in sets if one.included())
        model = torch.nn.Linear(2, 1)
        optimizer = world.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), process_set=mine, shard=shard
        )
        for _ in range(steps):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ranks = mine.ranks
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"ProcessSet\(id=\d+, ranks=\[{ranks[0]}.*\) has been removed"):
            model(torch.ones(1, 2)).sum().backward()
    assert world.allreduce(torch.ones(1), op=world.Sum).item() == world.size()
