"""Training on GPUs equals training on a single process with all the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.ranks(2, 3, 4, timeout_s=120)]

STEPS, ROWS = 4, 12


def device(world: Any) -> torch.device:
    return torch.device("cuda", world.local_rank() % torch.cuda.device_count())


def make(here: torch.device) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(300, 700), torch.nn.ReLU(), torch.nn.Linear(700, 700), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(700, 3)).double().to(here)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def batch(step: int, here: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(ROWS, 300, generator=generator, dtype=torch.float64)
    return inputs.to(here), torch.randn(ROWS, 3, generator=generator, dtype=torch.float64).to(here)


Step = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def plain(model: torch.nn.Module, inputs: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.mse_loss(model(inputs), wanted)


def on_side_streams(model: torch.nn.Module, inputs: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Backward runs each operation on the stream of its forward."""
    side, own = torch.cuda.Stream(inputs.device), torch.cuda.current_stream(inputs.device)
    side.wait_stream(own)
    half = len(model) // 2  # type: ignore[arg-type]
    with torch.cuda.stream(side):
        middle = model[:half](inputs)  # type: ignore[index]
        torch.cuda._sleep(int(2e7))
    own.wait_stream(side)
    return torch.nn.functional.mse_loss(model[half:](middle), wanted)  # type: ignore[index]


def train(model: torch.nn.Module, optimizer: Any, step: Step, rank: int, size: int, here: torch.device) -> None:
    for number in range(STEPS):
        inputs, wanted = batch(number, here)
        optimizer.zero_grad()
        step(model, inputs[rank::size], wanted[rank::size]).backward()
        if hasattr(optimizer, "clip_grad_norm_"):  # sharded
            optimizer.clip_grad_norm_(1.0)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@pytest.mark.parametrize("step", [plain, on_side_streams])
@pytest.mark.parametrize("shard", [False, True])
def test_equals_a_single_process(world: Any, step: Step, shard: bool) -> None:
    here = device(world)
    with torch.cuda.device(here):
        alone, optimizer = make(here)
        train(alone, optimizer, plain, 0, 1, here)
        model, optimizer = make(here)
        wrapped = world.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), shard=shard)
        train(model, wrapped, step, world.rank(), world.size(), here)
    for own, other in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)


def test_a_scaled_step_is_skipped_on_all_ranks(world: Any) -> None:
    """An inf on one rank only."""
    here = device(world)
    model = torch.nn.Linear(5, 5).to(here)
    world.broadcast_parameters(model.state_dict(), 0)
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped = world.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for number, is_bad in enumerate((True, False)):
        wrapped.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = model(torch.ones(2, 5, device=here)).sum()
        scaler.scale(loss * (float("inf") if is_bad and world.rank() == 0 else 1.0)).backward()
        scaler.unscale_(wrapped)
        scaler.step(wrapped)
        scaler.update()
        same = all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
        assert same == (number == 0)
    for param in model.parameters():
        assert torch.equal(world.broadcast(param.detach(), 0), param.detach())


def test_states_and_objects_stay_on_their_devices(world: Any) -> None:
    """What an elastic state restores, and what is broadcast, lies on the rank's own GPU."""
    here = device(world)
    torch.cuda.set_device(here)
    model, optimizer = make(here)
    wrapped = world.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    state = world.elastic.TorchState(model, wrapped, best=torch.ones(3, device=here), epoch=0)
    train(model, wrapped, plain, world.rank(), world.size(), here)
    state.best.fill_(2)
    state.restore()
    assert state.best.device == here and state.best.tolist() == [1, 1, 1]
    train(model, wrapped, plain, world.rank(), world.size(), here)
    state.sync()
    assert state.best.device == here and all(param.device == here for param in model.parameters())
    world.broadcast_parameters(model.state_dict(), 1)
    world.broadcast_optimizer_state(wrapped, 1)
    assert all(value["momentum_buffer"].device == here for value in wrapped.state.values())
    found = world.broadcast_object({"x": torch.full((2,), world.rank(), device=here)}, 1)["x"]
    assert found.device == here and found.tolist() == [1, 1]
    assert world.mean(torch.tensor(world.rank(), device=here), torch.ones(1, device=here)) == (world.size() - 1) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("affine", [True, False])
def test_sync_batch_norm_equals_the_whole_batch(world: Any, dtype: torch.dtype, affine: bool) -> None:
    """With parameters in float32 and inputs in either, as under autocast; any layout of the input."""
    here, rank, size = device(world), world.rank(), world.size()
    whole = torch.randn(size * 4, 6, 5, 5, generator=torch.Generator().manual_seed(1)).to(here)
    alone = torch.nn.BatchNorm2d(6, affine=affine).to(here)
    ours = world.SyncBatchNorm(6, affine=affine).to(here)
    wanted, mine = whole.clone().requires_grad_(), whole[4 * rank : 4 * rank + 4].to(dtype)
    mine = mine.to(memory_format=torch.channels_last).requires_grad_()
    alone(wanted).square().mean().backward()
    (ours(mine).float().square().sum() / whole.numel()).backward()
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-3}
    assert mine.grad is not None and wanted.grad is not None
    torch.testing.assert_close(mine.grad.float(), wanted.grad[4 * rank : 4 * rank + 4], **tolerance)
    torch.testing.assert_close(ours.running_var, alone.running_var, **tolerance)
