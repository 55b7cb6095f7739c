"""PowerSGD in training: several buckets, accumulation, sparse gradients, a rank that joins; and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.mpi.training import assert_replicas_equal

pytestmark = pytest.mark.ranks(2, 3)


class Words(nn.Module):
    """A sparse embedding, two matrices that are compressed, a norm that is not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(20, 16, sparse=True)
        self.image = nn.Conv2d(4, 12, 2).to(memory_format=torch.channels_last)
        self.rest = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 2))
        self.double()

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.rest(self.image(self.words(words).view(-1, 4, 2, 2)).flatten(1))


def batch(step: int, world: Any) -> torch.Tensor:
    """12 words, of which each rank has its part."""
    words = torch.randint(20, (12,), generator=torch.Generator().manual_seed(step))
    return words.chunk(world.size())[world.rank()]


def train(world: Any, compression: Any, steps: int, **options: Any) -> nn.Module:
    model = Words()
    optimizer = world.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), compression, **options
    )
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(options.get("backward_passes_per_step", 1)):
            model(batch(10 * step + part, world)).pow(2).mean().backward()
        optimizer.step()
    assert_replicas_equal(world, model)
    return model


@pytest.mark.parametrize("options", [{}, {"num_groups": 3}, {"backward_passes_per_step": 2}], ids=str)
def test_powersgd_trains(world: Any, options: dict[str, Any]) -> None:
    """Full rank is an exchange as it is; a lower one brings the replicas elsewhere, all to the same place."""
    plain = train(world, world.Compression.none, 4, **options)
    for rank, start_step, is_exact in ((40, 0, True), (1, 4, True), (1, 2, False)):
        compression = world.Compression.powersgd(rank, start_step, min_compression_rate=0.1)
        model = train(world, compression, 4, **options)
        same = [torch.allclose(a, b, atol=1e-9) for a, b in zip(plain.parameters(), model.parameters(), strict=True)]
        assert all(same) == is_exact


def start(world: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 20))
    compression = world.Compression.powersgd(rank=2, start_step=2, min_compression_rate=1.1)
    return model, world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), compression=compression)


def go_on(world: Any, model: nn.Module, optimizer: Any, steps: range) -> torch.Tensor:
    for step in steps:
        optimizer.zero_grad()
        draw = torch.Generator().manual_seed(100 * step + world.rank())
        model(torch.randn(4, 40, generator=draw)).pow(2).mean().backward()
        optimizer.step()
    assert_replicas_equal(world, model)
    return torch.cat([param.detach().reshape(-1) for param in model.parameters()])


@pytest.mark.parametrize("cut", [1, 4])
def test_powersgd_is_resumed_bit_by_bit(world: Any, shared_path: Any, cut: int, caplog: Any) -> None:
    """Before the first compressed step and after it; from each rank's own state, and from a checkpoint."""
    from mpiddp.checkpoint import Checkpoints

    want = go_on(world, *start(world), range(7))
    model, optimizer = start(world)
    go_on(world, model, optimizer, range(cut))
    Checkpoints(shared_path / str(cut), model=model, optimizer=optimizer).save(cut)
    states = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    for trained in (0, 3):
        model, optimizer = start(world)
        go_on(world, model, optimizer, range(trained))
        for each, state in zip((model, optimizer), states, strict=True):
            each.load_state_dict(copy.deepcopy(state))
        assert torch.equal(go_on(world, model, optimizer, range(cut, 7)), want)
    model, optimizer = start(world)
    assert Checkpoints(shared_path / str(cut), model=model, optimizer=optimizer).restore() == cut
    assert torch.equal(go_on(world, model, optimizer, range(cut, 7)), want)
    model, optimizer = start(world)
    if world.rank() == 0:
        optimizer.load_state_dict(states[1])
    world.broadcast_optimizer_state(optimizer, 0)
    go_on(world, model, optimizer, range(cut, 7))  # the ranks agree which steps are compressed
    caplog.clear()
    optimizer.load_state_dict(world.broadcast_object(states[1], 0))
    assert caplog.text.count("is not taken over") == (world.rank() > 0)


def test_powersgd_in_16_bits_and_under_autocast(world: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 8)).bfloat16()
    optimizer = world.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), compression=world.Compression.powersgd(start_step=0)
    )
    draw = torch.Generator().manual_seed(world.rank())
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(6, 32, generator=draw).bfloat16()).pow(2).sum().backward()
        optimizer.step()
    assert_replicas_equal(world, model)


def test_powersgd_goes_on_when_a_rank_has_joined(world: Any) -> None:
    """Full rank, so that what arrives is the sum of those that are left, over the number of all."""
    size, rank = world.size(), world.rank()
    weight = nn.Parameter(torch.zeros(6, 8, dtype=torch.float64))
    compression = world.Compression.powersgd(6, 0, min_compression_rate=0.1)
    optimizer = world.DistributedOptimizer(torch.optim.SGD([weight], lr=1.0), compression=compression)
    for step in range(2 + 2 * rank):
        optimizer.zero_grad()
        (weight * (step + torch.eye(6, 8, dtype=torch.float64))).sum().backward()
        left = sum(step < 2 + 2 * other for other in range(size))
        torch.testing.assert_close(weight.grad, (step + torch.eye(6, 8).double()) * left / size, atol=1e-9, rtol=0)
        optimizer.step()
    assert world.join() == size - 1


def test_powersgd_refuses_what_it_does_not_go_with(world: Any) -> None:
    compression = world.Compression.powersgd()
    for options, words in (
        ({"deterministic": True}, "deterministic=True"),
        ({"shard": True}, "shard=True"),
        ({"op": world.Adasum}, "Adasum"),
    ):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2, 2))], lr=0.1)
        with pytest.raises(ValueError, match=words):
            world.DistributedOptimizer(optimizer, compression=compression, **options)
    with pytest.raises(TypeError, match="parentheses"):
        world.DistributedOptimizer(optimizer, compression=world.Compression.powersgd)
