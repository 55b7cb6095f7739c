"""Checkpoints of a job: all that needs several ranks."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpiddp.checkpoint import checkpoints as module
from mpiddp.checkpoint import preemption
from mpiddp.errors import CheckpointError

pytestmark = pytest.mark.ranks(2, 3)


def build(world: Any, shard: bool, seed: int = 0) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, world.DistributedOptimizer(optimizer, model.named_parameters(), shard=shard)


def train(model: nn.Module, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()


def parameters(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("shard", [False, True])
def test_everything_goes_on_where_it_was(world: Any, shared_path: Path, shard: bool) -> None:
    model, optimizer = build(world, shard)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    sampler = world.ShardSampler(100)
    random.seed(world.rank())
    torch.manual_seed(world.rank())
    train(model, optimizer, 2)
    schedule.step()
    sampler.set_epoch(3)
    sampler.record(4)
    kept = {"model": model, "optimizer": optimizer, "schedule": schedule, "sampler": sampler}
    path = world.checkpoint.Checkpoints(shared_path, **kept).save(2, best=0.25)
    assert path == shared_path / "step-00000002" and (path / "optimizer").exists() == shard
    train(model, optimizer, 2)
    expected, number = parameters(model), random.random()

    other, its_optimizer = build(world, shard, seed=world.rank() + 7)
    schedule = torch.optim.lr_scheduler.ExponentialLR(its_optimizer, 0.5)
    sampler = world.ShardSampler(100)
    kept = {"model": other, "optimizer": its_optimizer, "schedule": schedule, "sampler": sampler}
    found = world.checkpoint.Checkpoints(shared_path, **kept)
    assert found.restore() == 2 and found.values == {"best": 0.25}
    assert schedule.last_epoch == 1 and (sampler.epoch, sampler.consumed) == (3, 4 * world.size())
    train(other, its_optimizer, 2)
    assert torch.equal(parameters(other), expected) and random.random() == number
    assert world.checkpoint.Checkpoints(shared_path / "none", model=other).restore() == 0


def test_one_rank_that_cannot_write_fails_the_save_everywhere(
    world: Any, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = build(world, True)
    train(model, optimizer, 1)
    checkpoints = world.checkpoint.Checkpoints(shared_path, model=model, optimizer=optimizer, keep=1)
    checkpoints.save(1)
    for failing in (0, world.size() - 1):
        with monkeypatch.context() as patch:
            if world.rank() == failing:
                patch.setattr(type(checkpoints._kept[1]), "write", no_space)
            words = rf"checkpoint of step 2 could not be written .*: rank {failing}: OSError.*No space left"
            with pytest.raises(CheckpointError, match=words):
                checkpoints.save(2)
    world.barrier()
    assert [path.name for path in shared_path.iterdir()] == ["step-00000001"]
    world.barrier()
    with pytest.raises(CheckpointError, match="the ranks save different steps"):
        checkpoints.save(world.rank())
    with pytest.raises(CheckpointError, match="whole number from 0 on, not 'seven'"):
        checkpoints.save("seven")
    assert checkpoints.restore() == 1


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_does_not_fit_is_an_error_everywhere(world: Any, shared_path: Path) -> None:
    model, _ = build(world, False)
    world.checkpoint.Checkpoints(shared_path, model=model).save(1)
    with pytest.raises(CheckpointError, match="holds model, and not optimizer"):
        world.checkpoint.Checkpoints(shared_path, model=model, optimizer=build(world, False)[1]).restore()
    with pytest.raises(CheckpointError, match=r"rank 0: model of .* does not fit: RuntimeError"):
        world.checkpoint.Checkpoints(shared_path, model=nn.Linear(2, 2)).restore()


def test_where_all_are_damaged_no_rank_begins_anew(world: Any, shared_path: Path) -> None:
    model, _ = build(world, False)
    checkpoints = world.checkpoint.Checkpoints(shared_path, model=model)
    path = checkpoints.save(1)
    if world.rank() == 0:
        os.truncate(path / "state.pt", 10)
    world.barrier()
    with pytest.raises(CheckpointError, match=r"could not be restored: rank 0: .* are damaged \(1\): to begin anew"):
        checkpoints.restore()


class Counting(nn.Linear):
    """A layer with a state that is no tensor, or one that is made for its state_dict."""

    def __init__(self, count: Any) -> None:
        super().__init__(2, 2)
        self.count = count

    def get_extra_state(self) -> Any:
        return {"count": self.count} if isinstance(self.count, int) else self.count.clone()

    def set_extra_state(self, state: Any) -> None:
        self.count = state["count"] if isinstance(state, dict) else state.clone()


def test_a_model_s_extra_state_comes_to_all_ranks(world: Any, shared_path: Path) -> None:
    model = nn.Sequential(Counting(7), Counting(torch.arange(3)))
    world.broadcast_parameters(model.parameters())
    world.checkpoint.Checkpoints(shared_path, model=model).save(1)
    other = nn.Sequential(Counting(world.rank()), Counting(torch.zeros(world.rank())))
    world.checkpoint.Checkpoints(shared_path, model=other).restore()
    assert other[0].count == 7 and torch.equal(other[1].count, torch.arange(3))
    assert torch.equal(parameters(other), parameters(model))


def test_an_elastic_sampler_s_indices_of_all_ranks(world: Any, shared_path: Path) -> None:
    sampler = world.elastic.ElasticSampler(20, shuffle=False)
    sampler.record_indices([world.rank()])
    world.checkpoint.Checkpoints(shared_path, sampler=sampler).save(1)
    other = world.elastic.ElasticSampler(20, shuffle=False)
    world.checkpoint.Checkpoints(shared_path, sampler=other).restore()
    assert other.remaining_indices == list(range(world.size(), 20))


def test_a_signal_to_one_rank_is_an_answer_on_all(
    world: Any, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    monkeypatch.setattr(preemption, "_came", set())
    model, _ = build(world, False)
    try:
        kept = {"model": model, "signals": "USR2", "check_every": 2, "requeue": True}
        checkpoints = world.checkpoint.Checkpoints(shared_path, **kept)
        assert not any(checkpoints.preempted() for _ in range(5))
        if world.rank() == world.size() - 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        answers = [checkpoints.preempted() for _ in range(6)]
        assert world.allgather_object(answers) == [[False, True, True, True, True, True]] * world.size()
        monkeypatch.setattr(module, "requeue_job", lambda environ: "it is a Monday")
        monkeypatch.setattr(module, "held", lambda **_: contextlib.nullcontext())  # this process wants its signals
        with pytest.raises(SystemExit) as left:
            checkpoints.leave(4)
        assert left.value.code == 1, "it could not be requeued"
        assert checkpoints.restore() == 4
    finally:
        signal.signal(signal.SIGUSR2, before)
