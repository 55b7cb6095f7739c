"""Several backwards before a step, with ``op=Sum`` and with averages over the passes: nothing is summed twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.ranks(2, 3)


def line(world: Any) -> torch.Tensor:
    return torch.full((1, 1), 1.0 + world.rank())


def total(world: Any) -> float:
    return float(world.size() * (world.size() + 1) / 2)


def ramp() -> nn.Module:
    return nn.Linear(1, 1, bias=False)


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_sums_of_two_losses(world: Any, shard: bool, whole: bool) -> None:
    """An actor and a critic, one optimizer: two backwards over different parameters, in either order."""
    actor, critic = ramp(), ramp()
    params = [*actor.parameters(), *critic.parameters()]
    optimizer = world.DistributedOptimizer(torch.optim.SGD(params, lr=0.0), op=world.Sum, shard=shard)
    for order in ((actor, critic), (critic, actor), (actor, critic)):
        optimizer.zero_grad()
        for model in order:
            model(line(world)).sum().backward()
            if whole:
                optimizer.synchronize()
        optimizer.synchronize()
        assert [param.grad.item() for param in params] == [total(world)] * 2
        with optimizer.skip_synchronize():
            optimizer.step()


def test_a_clipped_sum_stays_clipped(world: Any) -> None:
    """What is written to an exchanged gradient is not exchanged by another backward."""
    actor, critic = ramp(), ramp()
    optimizer = world.DistributedOptimizer(
        torch.optim.SGD([*actor.parameters(), *critic.parameters()], lr=0.0), op=world.Sum
    )
    actor(line(world)).sum().backward()
    actor.weight.grad.mul_(0.5)
    critic(line(world)).sum().backward()
    optimizer.step()
    assert actor.weight.grad.item() == total(world) / 2
    assert critic.weight.grad.item() == total(world)


def test_steps_without_a_backward(world: Any) -> None:
    """A step exchanges what has not been; a second one has nothing to exchange."""
    model = ramp()
    optimizer = world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), op=world.Sum)
    model.weight.grad = line(world)
    for _ in range(3):
        optimizer.step()
        assert model.weight.grad.item() == total(world)


def test_averages_over_the_passes_of_two_losses(world: Any) -> None:
    actor, critic = ramp(), ramp()
    params = [*actor.parameters(), *critic.parameters()]
    optimizer = world.DistributedOptimizer(
        torch.optim.SGD(params, lr=0.0), backward_passes_per_step=2, average_aggregated_gradients=True
    )
    for model in (actor, critic):
        for _ in range(2):
            model(line(world)).sum().backward()
    optimizer.step()
    assert [param.grad.item() for param in params] == [total(world) / world.size()] * 2


def test_sparse_sums_of_two_losses(world: Any) -> None:
    """One of an embedding, one of what is dense, in either order and again."""
    words, head = nn.Embedding(4, 1, sparse=True), ramp()
    params = [*words.parameters(), *head.parameters()]
    optimizer = world.DistributedOptimizer(torch.optim.SGD(params, lr=0.0), op=world.Sum)
    losses = [lambda: words(torch.tensor([1, 1, 2])).sum(), lambda: head(line(world)).sum()]
    for order in (losses, losses[::-1], losses):
        optimizer.zero_grad()
        for loss in order:
            loss().backward()
        optimizer.step()
        want = torch.tensor([[0.0], [2.0], [1.0], [0.0]]) * world.size()
        assert torch.equal(words.weight.grad.to_dense(), want)
        assert head.weight.grad.item() == total(world)


def test_a_sum_that_is_sparse_here_and_dense_there(world: Any) -> None:
    """It is held in either form, and not exchanged by the backward of another loss."""
    weight, head = nn.Parameter(torch.zeros(4, 1)), ramp()
    optimizer = world.DistributedOptimizer(torch.optim.SGD([weight, *head.parameters()], lr=0.0), op=world.Sum)
    for step in range(4):
        optimizer.zero_grad()
        if world.rank() == 0 or step == 2:
            nn.functional.embedding(torch.tensor([1]), weight, sparse=True).sum().backward()
        else:
            weight.sum().backward()
        for _ in range(2):
            head.zero_grad()
            head(line(world)).sum().backward()
        want = torch.full((4, 1), 0.0 if step == 2 else world.size() - 1.0)
        want[1] = world.size()
        grad = weight.grad.to_dense() if weight.grad.is_sparse else weight.grad
        assert torch.equal(grad, want), step
        assert head.weight.grad.item() == total(world)
        optimizer.step()
