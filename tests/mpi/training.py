"""What the tests of optimizers train: a model, batches that two, three and four ranks can share, and how it ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

ROWS = 12  # divisible by 2, 3 and 4


class Net(nn.Module):
    """Has a head that is never used, a block that some steps skip, and a parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.skipped = nn.Linear(16, 16)
        self.last = nn.Linear(16, 3)
        self.gain = nn.Parameter(torch.ones(()))
        self.unused = nn.Linear(16, 2)

    def forward(self, x: torch.Tensor, skip: bool = False) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        if not skip:
            hidden = hidden + torch.tanh(self.skipped(hidden))
        return self.last(hidden) * self.gain


def build(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().double()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(ROWS, 3, generator=generator, dtype=torch.float64)


def loss_of(net: nn.Module, rows: tuple[torch.Tensor, torch.Tensor], *args: Any) -> torch.Tensor:
    return nn.functional.mse_loss(net(rows[0], *args), rows[1])


def shard(world: Any, rows: torch.Tensor) -> torch.Tensor:
    """This rank's rows."""
    return rows.chunk(world.size())[world.rank()]


def part(world: Any, rows: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's share of a batch."""
    return shard(world, rows[0]), shard(world, rows[1])


def assert_replicas_equal(world: Any, model: nn.Module) -> None:
    """Its parameters are the same bits on every rank. Collective."""
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    everyone = world.allgather(flat.unsqueeze(0))
    assert all(torch.equal(everyone[0], other) for other in everyone), "the replicas drifted apart"


def assert_close(model: nn.Module, reference: nn.Module) -> None:
    for (name, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def shrink_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several buckets even in a small model."""
    from mpiddp.optimizer import distributed

    original = distributed.Options
    monkeypatch.setattr(
        distributed, "Options", lambda **kwargs: original(**kwargs | {"first_nbytes": 256, "bucket_nbytes": 1024})
    )
