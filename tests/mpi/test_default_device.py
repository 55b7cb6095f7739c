"""torch.set_default_device("cuda") in a script changes nothing here: what the library makes for itself lies where it
must. The meta device stands in: whatever is made there by mistake has no content."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.ranks(2)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def elsewhere() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_collectives(world: Any) -> None:
    rank, size = world.rank(), world.size()
    mine = torch.full((4, 3), rank + 1.0, device=CPU, requires_grad=True)
    results = [
        world.allreduce(mine, op=world.Sum),
        world.allgather(mine),
        world.broadcast(mine, 1),
        world.alltoall(mine, splits=torch.tensor([2, 2], device=CPU))[0],
        world.reducescatter(mine, op=world.Sum),
        *world.grouped_allgather([mine, mine]),
        *world.grouped_reducescatter([mine, mine]),
    ]
    sum((result.sum() for result in results), torch.zeros((), device=CPU)).backward()
    assert mine.grad is not None and all(result.device == CPU for result in results)
    assert results[0][0, 0].item() == 3 and world.any_rank(rank == 0) and not world.all_ranks(rank == 0)
    assert world.allreduce(torch.ones(200_000, device=CPU), op=world.Sum)[-1].item() == size
    assert world.empty(3, 2).device == CPU
    world.barrier()
    assert world.join() in range(size)
    some = world.add_process_set([1])
    assert world.remove_process_set(some)


def test_functions(world: Any) -> None:
    rank = world.rank()
    assert world.broadcast_object({"a": rank}, 1) == {"a": 1} and world.allgather_object(rank) == [0, 1]
    assert world.mean(rank, 1) == 0.5
    model = torch.nn.Linear(3, 2, device=CPU)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3, device=CPU)).sum().backward()
    optimizer.step()
    world.broadcast_parameters(model.state_dict(), 0)
    world.broadcast_optimizer_state(optimizer, 0)
    norm = world.SyncBatchNorm(3, device=CPU)
    assert norm(torch.randn(4, 3, device=CPU)).device == CPU
    order = list(world.ShardSampler(range(10)))
    assert sorted(i for each in world.allgather_object(order) for i in each) == list(range(10))


@pytest.mark.parametrize("kind", ["plain", "shard", "sparse", "adasum"])
def test_training(world: Any, kind: str) -> None:
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(5, 3, sparse=kind == "sparse", device=CPU)
    model = torch.nn.Sequential(embedding, torch.nn.Linear(3, 2, device=CPU))
    world.broadcast_parameters(model.state_dict(), 0)
    options: dict[str, Any] = {"shard": {"shard": True}, "adasum": {"op": world.Adasum}}.get(kind, {})
    optimizer = world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **options)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.tensor([step, world.rank()], device=CPU)).sum().backward()
        if kind == "shard":
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    for param in model.parameters():
        assert torch.equal(world.broadcast(param.detach(), 0), param.detach())
