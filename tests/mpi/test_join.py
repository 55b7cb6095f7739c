"""join: ranks that run out of data early contribute zeros until all have."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

from tests.api.oracle import DTYPES, FORMS, close

pytestmark = pytest.mark.ranks(2, 3, 4)


def uneven(world: Any) -> list[int]:
    """How many batches each rank has: the later ranks have more, rank 0 none."""
    return [3 * rank for rank in range(world.size())]


@pytest.mark.parametrize("form", FORMS)
def test_sums_and_averages_go_on(world: Any, form: str) -> None:
    """An average divides by the full size, and the last to join is the answer."""
    size, rank, batches = world.size(), world.rank(), uneven(world)
    for number in range(batches[rank]):
        active = [r for r in range(size) if batches[r] > number]
        for numel in (3, 30_000):
            mine = torch.full((numel,), rank + 1.0)
            total = sum(r + 1.0 for r in active)
            close(FORMS[form](world, mine.clone(), op=world.Sum), torch.full((numel,), total))
            close(FORMS[form](world, mine.clone()), torch.full((numel,), total / size))
            scaled = FORMS[form](world, mine.clone(), op=world.Sum, prescale_factor=0.5, postscale_factor=4.0)
            close(scaled, torch.full((numel,), 2 * total))
    assert world.join() == size - 1
    assert FORMS[form](world, torch.ones(2), op=world.Sum)[0] == size


def test_every_dtype(world: Any) -> None:
    """Under names that the joined ranks have never heard; several in flight, so that they are fused."""
    size, rank = world.size(), world.rank()
    if rank > 0:
        for turn in range(2):
            handles = {
                dtype: [
                    world.allreduce_async(torch.full((5,), 2).to(dtype), name=f"{dtype} {n}", op=world.Sum)
                    for n in range(3 + turn)
                ]
                for dtype in DTYPES
            }
            for dtype, some in handles.items():
                for handle in some:
                    close(world.synchronize(handle), torch.full((5,), 2 * (size - 1)).to(dtype))
    assert world.join() in range(1, size)


@pytest.mark.parametrize("late", [0, -1])
def test_the_answer_is_who_joined_last(world: Any, late: int) -> None:
    last = late % world.size()
    if world.rank() == last:
        time.sleep(0.3)
        assert world.allreduce(torch.ones(1), op=world.Sum).item() == 1
    assert world.join() == last


def test_all_at_once_again_and_again(world: Any) -> None:
    for _ in range(5):
        world.barrier()
        answer = world.join()
        assert world.allgather(torch.tensor([answer])).unique().tolist() == [answer]
    assert world.join(device=-1) in range(world.size()) and world.join(0) in range(world.size())


def test_what_needs_every_rank_raises(world: Any) -> None:
    """On those who still work, naming who has joined; sums go on."""
    size, rank = world.size(), world.rank()
    if rank != 0:
        world.allreduce(torch.ones(1), op=world.Sum)  # and so rank 0 has joined
        tensor = torch.ones(size, 2)
        calls = {
            "min": lambda: world.allreduce(tensor, op=world.Min, name="x"),
            "max": lambda: world.allreduce_async(tensor, op=world.Max),
            "product": lambda: world.allreduce(tensor, op=world.Product),
            "allgather": lambda: world.allgather(tensor, name="gather"),
            "broadcast": lambda: world.broadcast(tensor, size - 1),
            "alltoall": lambda: world.alltoall(tensor),
            "reducescatter": lambda: world.reducescatter(tensor),
            "grouped": lambda: world.grouped_allgather([tensor, tensor]),
            "object": lambda: world.broadcast_object(3, 1),
            "sparse": lambda: world.sparse_allreduce_async(tensor.to_sparse(), "s", world.Sum)(),
            "any": lambda: world.any_rank(True),
        }
        if size in (2, 4):
            calls["adasum"] = lambda: world.allreduce(tensor, op=world.Adasum)
        for call in calls.values():
            with pytest.raises(world.HorovodInternalError, match=r"rank 0 has joined"):
                result = call()
                world.synchronize(result)
        assert world.allreduce(torch.ones(2), op=world.Sum)[0] == size - 1
        world.barrier()
    world.join()
    assert world.allgather(torch.ones(1)).numel() == size


def test_what_was_in_flight_when_others_joined(world: Any) -> None:
    """A rank submits, and joins only then; what it submitted is its own contribution."""
    size, rank = world.size(), world.rank()
    handle = world.allreduce_async(torch.full((3,), rank + 1.0), name="before", op=world.Sum)
    if rank == 0:
        world.join()
    else:
        time.sleep(0.05)
        assert world.allreduce(torch.ones(1), op=world.Sum).item() == size - 1
        world.join()
    assert world.synchronize(handle)[0] == size * (size + 1) / 2


def test_unnamed_operations_after_an_uneven_join_still_match(world: Any) -> None:
    for _ in range(world.rank()):
        world.allreduce(torch.ones(1))
    world.join()
    for numel in (1, 20_000):
        assert world.allreduce(torch.ones(numel), op=world.Sum)[0] == world.size()
        assert world.allgather(torch.ones(2)).numel() == 2 * world.size()


def test_groups(world: Any) -> None:
    size, rank = world.size(), world.rank()
    if rank > 0:
        for name in (None, "group"):
            tensors = [torch.ones(2), torch.ones(3, dtype=torch.int64)]
            results = world.grouped_allreduce(tensors, name=name, op=world.Sum)
            assert [result[0].item() for result in results] == [size - 1] * 2
    world.join()


def test_sets(world: Any) -> None:
    """A joined rank serves every set that it belongs to, and a set without it does not need it."""
    size, rank = world.size(), world.rank()
    without, tail = world.add_process_set(list(range(1, size))), world.add_process_set([0])
    few = world.add_process_set([0, 1]) if size > 2 else world.global_process_set
    if rank > 0:
        assert world.allreduce(torch.ones(1), op=world.Sum).item() == size - 1  # rank 0 has joined
        assert world.allgather(torch.ones(1), process_set=without).numel() == size - 1
        assert world.allreduce(torch.ones(1), op=world.Sum, process_set=without).item() == size - 1
        if rank == 1:
            for numel in (2, 40_000):
                assert world.allreduce(torch.ones(numel), op=world.Sum, process_set=few)[0] == 1
            mean = world.allreduce(torch.ones(1), process_set=few).item()
            assert mean == pytest.approx(1 / (2 if size > 2 else size) if size > 2 else 0.5)
            with pytest.raises(world.HorovodInternalError, match="rank 0 has joined"):
                world.allgather(torch.ones(1), process_set=few)
    assert world.join() in range(1, size)
    for one in (without, tail, few):
        assert world.remove_process_set(one) is (one is not world.global_process_set)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("options", ["plain", "fp16", "groups", "sum"])
def test_training_on_uneven_data(world: Any, passes: int, options: str) -> None:
    """As one process over what there is, a missing batch counting as zeros; rank 0 has none at all."""
    size, rank = world.size(), world.rank()
    batches = [2 * passes * r for r in range(size)]

    def build() -> nn.Module:
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def batch(owner: int, number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 * owner + number)
        return torch.randn(4, 3, generator=generator, dtype=torch.float64)

    arguments: dict[str, Any] = {
        "plain": {},
        "fp16": {"compression": world.Compression.fp16},
        "groups": {"num_groups": 2},
        "sum": {"op": world.Sum},
    }[options]
    model, reference = build(), build()
    optimizer = world.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), backward_passes_per_step=passes, **arguments
    )
    plain = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    for number in range(batches[rank]):
        model(batch(rank, number)).pow(2).mean().backward()
        if (number + 1) % passes == 0:
            optimizer.step()
            optimizer.zero_grad()
    answer = world.join()
    assert answer == size - 1
    for param in model.parameters():
        world.broadcast_(param.data, answer)
    for number in range(max(batches)):
        for owner in range(size):
            if number < batches[owner]:
                loss = reference(batch(owner, number)).pow(2).mean()
                (loss / (1 if options == "sum" else size)).backward()
        if (number + 1) % passes == 0:
            plain.step()
            plain.zero_grad()
    tolerance = 1e-2 if options == "fp16" else 1e-9
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_training_goes_on_after_a_join(world: Any) -> None:
    """Several epochs of uneven data with the same optimizer; the parameters of early ranks are left alone meanwhile."""
    size, rank = world.size(), world.rank()
    weight = nn.Parameter(torch.zeros(2))
    optimizer = world.DistributedOptimizer(torch.optim.SGD([weight], lr=1.0))
    expected = 0.0
    for epoch in range(3):
        batches = [1 + (r + epoch) % size for r in range(size)]
        for number in range(batches[rank]):
            optimizer.zero_grad()
            weight.sum().backward()
            optimizer.step()
            active = sum(b > number for b in batches)
            expected_now = sum(b > n for n in range(number + 1) for b in batches)
            assert weight[0].item() == pytest.approx(expected - expected_now / size, abs=1e-5)
            assert active
        stale = weight.detach().clone()
        answer = world.join()
        assert torch.equal(weight.detach(), stale)
        assert answer == max(range(size), key=lambda r: batches[r])
        world.broadcast_(weight.data, answer)
        expected = weight[0].item()


def test_a_scaler_and_a_scheduler(world: Any) -> None:
    """The scale stays equal on those who work, and an infinity of one of them skips their step."""
    size, rank = world.size(), world.rank()
    weight = nn.Parameter(torch.ones(2))
    optimizer = world.DistributedOptimizer(torch.optim.SGD([weight], lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)
    scales = []
    for number in range(4 if rank > 0 else 1):
        optimizer.zero_grad()
        factor = float("inf") if number == 2 and rank == size - 1 else 1.0
        scaler.scale((weight * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    world.join()
    if rank > 0:
        assert scales == [16.0, 32.0, 16.0, 16.0]
    seen = world.allgather_object((scales, weight.tolist()))
    assert all(other == seen[1] for other in seen[1:])


def test_two_optimizers_and_a_model_that_skips_parts(world: Any) -> None:
    size, rank = world.size(), world.rank()
    first, second = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    for net in (first, second):
        nn.init.zeros_(net.weight)
    optimizers = [world.DistributedOptimizer(torch.optim.SGD(net.parameters(), lr=1.0)) for net in (first, second)]
    for number in range(2 * rank):
        for optimizer in optimizers:
            optimizer.zero_grad()
        net = (first, second)[number % 2]
        net(torch.ones(1, 2)).sum().backward()
        optimizers[number % 2].step()
    answer = world.join()
    assert answer == size - 1
    want = -sum(sum(2 * r > 2 * n for r in range(size)) for n in range(size)) / size
    if rank == answer:
        torch.testing.assert_close(first.weight.detach(), torch.full((1, 2), want))
        torch.testing.assert_close(second.weight.detach(), torch.full((1, 2), want))
