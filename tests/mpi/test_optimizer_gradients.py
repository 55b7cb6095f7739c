"""What ``grad`` is between two backwards, and what may be done to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.ranks(2)


@pytest.mark.parametrize("shard", [False, True])
def test_a_gradient_can_be_detached_and_zeroed(world: Any, shard: bool) -> None:
    """As scripts do that zero gradients by hand."""
    model = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
    optimizer = world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), op=world.Sum, shard=shard)
    for _ in range(3):
        for param in model.parameters():
            if param.grad is not None:
                param.grad.detach_()
                param.grad.zero_()
        model(torch.ones(1, 2, 3, 3)).sum().backward()
        optimizer.synchronize()
        for param in model.parameters():
            assert torch.equal(param.grad, torch.full_like(param, 4.0 * world.size()))
            assert param.grad.stride() == param.stride()
        with optimizer.skip_synchronize():
            optimizer.step()
