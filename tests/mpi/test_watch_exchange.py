"""How much of the exchange backward hides, on ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import mpiddp


def train(steps: int, **options: Any) -> tuple[mpiddp.optimizer.ExchangeReport, Any]:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))
    plain = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = mpiddp.DistributedOptimizer(plain, model.named_parameters(), num_groups=4, **options)
    report = mpiddp.watch_exchange(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(16, 256)).sum().backward()
        optimizer.step()
    return report, optimizer


@pytest.mark.ranks(2)
@pytest.mark.parametrize("shard", [False, True])
def test_what_was_hidden_and_what_was_waited_for(world: Any, shard: bool) -> None:
    report, optimizer = train(6, shard=shard)
    assert report.steps == 5, "the first is not counted"
    assert 0 < report.waited_s <= report.under_way_s * 1.05 and report.hidden is not None
    assert 0 <= report.hidden < 1, "the last bucket leaves when backward has ended"
    assert "hidden behind backward" in str(report)
    again = mpiddp.watch_exchange(optimizer)
    assert again.steps == 0 and again.hidden is None


@pytest.mark.ranks(2)
def test_what_is_not_distributed_cannot_be_watched(world: Any) -> None:
    with pytest.raises(TypeError, match="what DistributedOptimizer returned, not a SGD"):
        mpiddp.watch_exchange(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0))


def test_the_command_plan(mpirun: Any, tmp_path: Any) -> None:
    file = tmp_path / "plan.csv"
    done = mpirun(["-m", "mpiddp", "plan", "--parameters", "1M", "--step-ms", "10", "--nodes", "1,4", "--csv", file], 2)
    assert "no network" in done.stdout
    head, *rows = [line.split(",") for line in file.read_text().splitlines()]
    assert head[:3] == ["nodes", "ranks", "algorithm"]
    assert [line[:3] for line in rows] == [["1", "2", "shared_memory"], ["4", "8", "hierarchical"]]
