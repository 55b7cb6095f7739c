"""Several optimizers in one backward, of which some ranks reach fewer than others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.mpi.training import assert_replicas_equal, shrink_buckets

pytestmark = pytest.mark.ranks(2, 3)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("reached", ["encoder", "decoder", "neither"])
def test_a_rank_whose_loss_reaches_one_of_two(
    world: Any, passes: int, reached: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second step on: at the first one all ranks agree on what is trained."""
    shrink_buckets(monkeypatch)
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(20, 20), nn.Linear(20, 20)
    optimizers = [
        world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), backward_passes_per_step=passes)
        for model in (encoder, decoder)
    ]
    for step in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        before = [model.bias.detach().clone() for model in (encoder, decoder)]
        for _ in range(passes):
            x = torch.ones(1, 20)
            if step == 0 or world.rank() == 0:
                decoder(encoder(x)).sum().backward()
            elif reached != "neither":
                {"encoder": encoder, "decoder": decoder}[reached](x).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        assert_replicas_equal(world, nn.ModuleList([encoder, decoder]))
        users = world.size() if step == 0 or reached == "decoder" else 1
        torch.testing.assert_close(decoder.bias, before[1] - passes * users / world.size())
        assert not torch.equal(encoder.bias, before[0])
