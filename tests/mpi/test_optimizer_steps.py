"""When ``step()`` exchanges: with a closure, after a step that was skipped, early, with a GradScaler, after a fork."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn

from tests.mpi.training import assert_replicas_equal

pytestmark = pytest.mark.ranks(2, 3)


def line(world: Any, rank: int | None = None) -> torch.Tensor:
    """An input that differs between the ranks: the gradient of a linear model's weight."""
    return torch.full((1, 1), 1.0 + (world.rank() if rank is None else rank))


def mean(world: Any) -> float:
    """The mean of :func:`line`."""
    return float((world.size() + 1) / 2)


def weight_of(lr: float = 1.0) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model, torch.optim.SGD(model.parameters(), lr=lr)


# -- closures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("max_norm", [None, 1000.0])
def test_a_closure_of_fewer_passes(world: Any, shard: bool, by_name: bool, max_norm: float | None) -> None:
    """It zeroes and makes one pass of two: the step is early, each time."""
    model, plain = weight_of()
    optimizer = world.DistributedOptimizer(plain, backward_passes_per_step=2, shard=shard, max_grad_norm=max_norm)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(line(world)).sum()
        loss.backward()
        return loss

    for step in range(3):
        loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        assert torch.equal(loss.detach(), line(world).sum() * -step * mean(world))
        assert model.weight.item() == -(step + 1) * mean(world)


@pytest.mark.parametrize("shard", [False, True])
def test_a_closure_that_reaches_no_parameter_on_a_rank(world: Any, shard: bool) -> None:
    model, plain = weight_of()
    optimizer = world.DistributedOptimizer(plain, shard=shard)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(line(world)).sum() if world.rank() == 0 else torch.ones((), requires_grad=True)
        loss.backward()
        return loss

    for step in range(3):
        optimizer.step(closure)
        assert model.weight.item() == pytest.approx(-(step + 1) / world.size())


# -- steps that are skipped --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", [False, True])
def test_an_early_step_after_a_skipped_one(world: Any, shard: bool) -> None:
    model, plain = weight_of()
    optimizer = world.DistributedOptimizer(plain, backward_passes_per_step=2, shard=shard)
    for _ in range(2):
        model(line(world)).sum().backward()
    optimizer.zero_grad()  # and no step
    model(line(world)).sum().backward()
    optimizer.step()
    assert model.weight.item() == -mean(world)


def test_a_pass_more_than_there_should_be(world: Any) -> None:
    """Is exchanged by step(), too."""
    model, plain = weight_of()
    optimizer = world.DistributedOptimizer(plain, backward_passes_per_step=2)
    for _ in range(3):
        model(line(world)).sum().backward()
    optimizer.step()
    assert model.weight.item() == pytest.approx(-3 * mean(world))


@pytest.mark.parametrize("shard", [False, True])
def test_a_rank_without_a_gradient_after_a_skipped_step(world: Any, shard: bool) -> None:
    model, plain = weight_of()
    optimizer = world.DistributedOptimizer(plain, shard=shard)
    model(line(world)).sum().backward()
    optimizer.zero_grad()  # and no step
    if world.rank() == 0:
        model(line(world)).sum().backward()
    optimizer.step()
    assert model.weight.item() == pytest.approx(-1 / world.size())


@pytest.mark.filterwarnings("error")
def test_synchronized_before_a_skipped_step(world: Any) -> None:
    """What was synchronized is gone with zero_grad(): no warning, and an exchange."""
    model, plain = weight_of()
    optimizer = world.DistributedOptimizer(plain, backward_passes_per_step=2)
    model(line(world)).sum().backward()
    optimizer.synchronize()
    optimizer.zero_grad()
    model(line(world)).sum().backward()
    optimizer.step()
    assert model.weight.item() == -mean(world)


def test_a_backward_after_synchronize(world: Any) -> None:
    model, plain = weight_of()
    optimizer = world.DistributedOptimizer(plain, backward_passes_per_step=2)
    model(line(world)).sum().backward()
    optimizer.synchronize()
    model(line(world)).sum().backward()
    optimizer.step()
    assert model.weight.item() == pytest.approx(-2 * mean(world))


def test_what_horovod_warns_with(world: Any) -> None:
    """Its own test looks for these words."""
    model, plain = weight_of()
    optimizer = world.DistributedOptimizer(plain)
    model(line(world)).sum().backward()
    optimizer.synchronize()
    with pytest.warns(UserWarning, match=r"^optimizer\.step\(\) called without optimizer\.skip_synchronize\(\)"):
        optimizer.step()


# -- where nothing may be exchanged ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["average", "adasum", "shard"])
def test_a_forked_child_communicates_nothing(world: Any, kind: str) -> None:
    model, plain = weight_of()
    op = world.Adasum if kind == "adasum" and world.size() == 2 else world.Average
    optimizer = world.DistributedOptimizer(plain, op=op, shard=kind == "shard")
    for _ in range(2):
        model(line(world)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    launched = [lane.launched for lane in _lanes(world)]
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            model(line(world)).sum().backward()
            optimizer.step()
            os.write(write, b"nothing was raised")
        except world.WorkerProcessError as error:
            os.write(write, f"refused: {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answers:
        said = answers.read()
    os.waitpid(child, 0)
    assert said.startswith("refused") and f"a child of rank {world.rank()}" in said
    assert launched == [lane.launched for lane in _lanes(world)]
    model(line(world)).sum().backward()
    optimizer.step()
    assert_replicas_equal(world, model)


def _lanes(world: Any) -> list[Any]:
    from mpiddp import runtime

    return list(runtime.current().channel.lanes)


# -- infinities --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "fused", "shard"])
@pytest.mark.parametrize("clips", [False, True])
def test_an_infinity_on_one_rank_in_an_early_step(world: Any, kind: str, clips: bool) -> None:
    """The last accumulation has fewer passes: every rank skips its step."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    plain = torch.optim.AdamW(model.parameters(), lr=0.1, fused=kind == "fused" or None)
    optimizer = world.DistributedOptimizer(plain, backward_passes_per_step=4, shard=kind == "shard")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(4):
        before = model.weight.detach().clone()
        for _ in range(4 if step == 0 else 2):
            x = torch.ones(4, 2)
            if step == 2 and world.rank() == world.size() - 1:
                x[0, 0] = float("inf")
            scaler.scale(model(x).mean()).backward()
        if clips:
            optimizer.synchronize()
            scaler.unscale_(optimizer)
            optimizer.clip_grad_norm_(100.0)
            with optimizer.skip_synchronize():
                scaler.step(optimizer)
        else:
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert scaler.get_scale() == (8.0 if step < 2 else 4.0)
        assert torch.equal(model.weight, before) == (step == 2)
        assert_replicas_equal(world, model)


def test_an_early_step_of_a_rank_without_gradients(world: Any) -> None:
    model, plain = weight_of()
    optimizer = world.DistributedOptimizer(plain, backward_passes_per_step=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    loss = model(line(world)).sum() if world.rank() == 0 else torch.ones((), requires_grad=True)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert model.weight.item() == pytest.approx(-1 / world.size())


@pytest.mark.parametrize("fused", [False, True])
def test_unscaled_before_an_early_exchange(world: Any, fused: bool) -> None:
    """A rank that saw no infinity there raises, and takes none for a gradient."""
    model, _ = weight_of()
    plain = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused or None)
    optimizer = world.DistributedOptimizer(plain, backward_passes_per_step=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    factor = float("inf") if world.rank() == 0 else 1.0
    scaler.scale(model(line(world)).sum() * factor).backward()
    scaler.unscale_(optimizer)
    if world.rank() == 0:
        scaler.step(optimizer)
    else:
        with pytest.raises(world.MpiddpError, match=r"optimizer\.synchronize\(\) and then scaler\.unscale_"):
            scaler.step(optimizer)
    assert model.weight.item() == 0.0
    world.barrier()
