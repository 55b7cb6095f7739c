"""Every optimizer of torch.optim, compiled models, and gradient scaling, through DistributedOptimizer."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.ranks(2, 3, 4)

ROWS = 12  # divisible by 2, 3 and 4

CLASSES = {
    name: found
    for name, found in inspect.getmembers(torch.optim, inspect.isclass)
    if issubclass(found, torch.optim.Optimizer) and found is not torch.optim.Optimizer
}


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(6, 4, sparse=kind == "SparseAdam")
        self.inner = nn.Linear(4, 4, bias=kind != "Muon")
        self.outer = nn.Linear(4, 2, bias=kind != "Muon")
        self.double()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(self.inner(self.words(rows))))

    def trained(self, kind: str) -> list[nn.Parameter]:
        return list(self.words.parameters()) if kind == "SparseAdam" else list(self.parameters())


def rows(step: int) -> torch.Tensor:
    return torch.randint(0, 6, (ROWS,), generator=torch.Generator().manual_seed(step))


def shard(world: Any, whole: torch.Tensor) -> torch.Tensor:
    return whole.chunk(world.size())[world.rank()]


def assert_equal(world: Any, model: nn.Module, reference: nn.Module, tolerance: float = 1e-6) -> None:
    """On all ranks alike to the last bit, and as in one process."""
    flat = torch.cat([param.detach().reshape(-1) for param in model.parameters()])
    everyone = world.allgather(flat.unsqueeze(0))
    assert all(torch.equal(everyone[0], other) for other in everyone), "the replicas drifted apart"
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_optimizer(world: Any, kind: str) -> None:
    model, reference = Net(kind), Net(kind)
    arguments = {"lr": 0.01} if "lr" in inspect.signature(CLASSES[kind]).parameters else {}

    def make(net: Net) -> torch.optim.Optimizer:
        return CLASSES[kind](net.trained(kind), **arguments)

    if kind == "LBFGS":
        with pytest.raises(ValueError, match="LBFGS"):
            world.DistributedOptimizer(make(model))
        return
    optimizer, plain = world.DistributedOptimizer(make(model), model.named_parameters()), make(reference)
    assert isinstance(optimizer, CLASSES[kind]) and type(optimizer).__name__ == kind
    scheduler, plain_scheduler = (torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5) for o in (optimizer, plain))
    for step in range(4):
        optimizer.zero_grad()
        plain.zero_grad()
        model(shard(world, rows(step))).pow(2).mean().backward()
        reference(rows(step)).pow(2).mean().backward()
        optimizer.step()
        plain.step()
        scheduler.step()
        plain_scheduler.step()
    # Rprop looks at signs alone, Muon orthogonalizes in bfloat16: rounding may grow in both.
    assert_equal(world, model, reference, 1e-2 if kind == "Muon" else 1e-6)
    assert optimizer.state_dict()["param_groups"] == plain.state_dict()["param_groups"]
    world.broadcast_optimizer_state(optimizer, 0)
    world.broadcast_parameters(model.state_dict(), 0)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "Adagrad"])
@pytest.mark.parametrize("implementation", ["foreach", "fused"])
def test_other_implementations(world: Any, kind: str, implementation: str) -> None:
    model, reference = Net(kind), Net(kind)

    def make(net: Net) -> torch.optim.Optimizer:
        return CLASSES[kind](net.parameters(), lr=0.01, **{implementation: True})

    optimizer, plain = world.DistributedOptimizer(make(model)), make(reference)
    for step in range(3):
        optimizer.zero_grad()
        plain.zero_grad()
        model(shard(world, rows(step))).pow(2).mean().backward()
        reference(rows(step)).pow(2).mean().backward()
        optimizer.step()
        plain.step()
    assert_equal(world, model, reference)


class Odd(torch.optim.Optimizer):
    """A user's own, with a step that takes more, and attributes of its own."""

    def __init__(self, params: Any, rate: float) -> None:
        super().__init__(params, {"rate": rate})
        self.steps_taken = 0

    def step(self, closure: Callable[[], float] | None = None, *, times: int = 1) -> int:
        self.steps_taken += 1
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        param -= group["rate"] * times * param.grad
        return self.steps_taken


def test_an_optimizer_of_the_users_own(world: Any) -> None:
    model, reference = Net("Odd"), Net("Odd")
    optimizer, plain = world.DistributedOptimizer(Odd(model.parameters(), 0.1)), Odd(reference.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        plain.zero_grad()
        model(shard(world, rows(step))).pow(2).mean().backward()
        reference(rows(step)).pow(2).mean().backward()
        assert optimizer.step(times=2) == plain.step(times=2) == step + 1
    assert optimizer.steps_taken == 3
    assert_equal(world, model, reference)


@pytest.mark.ranks(2, 3, 4, timeout_s=120)
@pytest.mark.parametrize("whole_step", [False, True])
def test_a_compiled_model(world: Any, whole_step: bool) -> None:
    compile_and_train(world, "aot_eager", whole_step)


@pytest.mark.slow
@pytest.mark.ranks(2, timeout_s=300)
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_model_compiled_by_inductor(world: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compile_and_train(world, "inductor", False)


def compile_and_train(world: Any, backend: str, whole_step: bool) -> None:
    """Only the model is compiled, or forward and backward in one function."""
    torch._dynamo.reset()
    model, reference = Net("SGD"), Net("SGD")
    optimizer = world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    compiled = torch.compile(model, backend=backend)

    def learn(batch: torch.Tensor) -> torch.Tensor:
        loss = model(batch).pow(2).mean()
        loss.backward()
        return loss

    learn_compiled = torch.compile(learn, backend=backend)
    for step in range(4):
        optimizer.zero_grad()
        plain.zero_grad()
        mine = shard(world, rows(step))
        if whole_step:
            learn_compiled(mine)
        else:
            compiled(mine).pow(2).mean().backward()
        reference(rows(step)).pow(2).mean().backward()
        for param, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(param.grad, theirs.grad)
        optimizer.step()
        plain.step()
    assert_equal(world, model, reference)
    torch._dynamo.reset()


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("unscale", ["no", "yes", "horovod"])
def test_a_gradient_scaler(world: Any, passes: int, unscale: str) -> None:
    """With clipping after unscale_; as Horovod's scripts do it, with synchronize() before; an infinity on one rank."""
    size, rank = world.size(), world.rank()
    model, reference = Net("SGD"), Net("SGD")
    optimizer = world.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), backward_passes_per_step=passes
    )
    plain = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2) for _ in range(2)]
    for step in range(5):
        optimizer.zero_grad()
        plain.zero_grad()
        for number in range(passes):
            batch = rows(10 * step + number)
            bad = float("inf") if step == 3 else 1.0
            mine = model(shard(world, batch)).pow(2).mean()
            scalers[0].scale(mine * (bad if rank == size - 1 else 1.0)).backward()
            scalers[1].scale(reference(batch).pow(2).mean() * bad).backward()
        if unscale == "horovod":
            optimizer.synchronize()
        if unscale != "no":
            for scaler, wrapped, net in zip(scalers, (optimizer, plain), (model, reference), strict=True):
                scaler.unscale_(wrapped)
                nn.utils.clip_grad_norm_(net.parameters(), 0.01)
        if unscale == "horovod":
            with optimizer.skip_synchronize():
                scalers[0].step(optimizer)
        else:
            scalers[0].step(optimizer)
        scalers[1].step(plain)
        for scaler in scalers:
            scaler.update()
        scale = scalers[0].get_scale()
        assert scale == scalers[1].get_scale()
        assert world.allgather(torch.tensor([scale])).unique().tolist() == [scale]
    assert_equal(world, model, reference)


def test_autocast(world: Any) -> None:
    model, reference = Net("SGD").float(), Net("SGD").float()
    optimizer = world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        plain.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mine, whole = model(shard(world, rows(step))), reference(rows(step))
            mine.float().pow(2).mean().backward()  # within autocast, as some scripts do
            whole.float().pow(2).mean().backward()
        optimizer.step()
        plain.step()
    assert_equal(world, model, reference, 2e-2)
    assert all(param.grad.dtype == torch.float32 for param in model.parameters())
