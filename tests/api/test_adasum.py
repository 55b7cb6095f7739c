"""Adasum: of tensors, and of an optimizer's steps, against the formula in NumPy."""

from __future__ import annotations

import copy
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from tests.api.oracle import FORMS, adasum

pytestmark = pytest.mark.ranks(2, 3, 4)


def vectors(size: int, numel: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    found = []
    for rank in range(size):
        generator = torch.Generator().manual_seed(100 * seed + rank)
        found.append(torch.randn(numel, generator=generator, dtype=torch.float64).to(dtype))
    return found


def of(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.from_numpy(adasum([tensor.to(torch.float64).numpy() for tensor in tensors]))


@pytest.mark.parametrize("form", FORMS)
def test_against_the_formula(world: Any, form: str) -> None:
    size, rank = world.size(), world.rank()
    if size == 3:
        with pytest.raises(ValueError, match="power of two, not 3"):
            FORMS[form](world, torch.ones(4), op=world.Adasum)
        return
    tolerances = {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float32: 1e-5, torch.float64: 1e-12}
    for seed, (dtype, tolerance) in enumerate(tolerances.items()):
        for numel in (1, 50, 30_000):
            tensors = vectors(size, numel, dtype, seed)
            result = FORMS[form](world, tensors[rank].clone(), op=world.Adasum)
            assert result.dtype == dtype
            torch.testing.assert_close(result.to(torch.float64), of(tensors), rtol=tolerance, atol=tolerance)
            everyone = world.allgather(result.unsqueeze(0))
            assert all(torch.equal(everyone[0], other) for other in everyone)
        scaled = FORMS[form](world, tensors[rank].clone(), op=world.Adasum, prescale_factor=2.0, postscale_factor=0.25)
        torch.testing.assert_close(scaled.to(torch.float64), of(tensors) / 2, rtol=tolerance, atol=tolerance)


def test_what_it_is_for(world: Any) -> None:
    """Equal vectors stay as they are, orthogonal ones are added, zeros change nothing."""
    size, rank = world.size(), world.rank()
    if size == 3:
        return
    assert torch.allclose(world.allreduce(torch.ones(5), op=world.Adasum), torch.ones(5))
    own = torch.zeros(size)
    own[rank] = rank + 1.0
    assert torch.allclose(world.allreduce(own, op=world.Adasum), torch.arange(1.0, size + 1))
    first = torch.ones(3) if rank == 0 else torch.zeros(3)
    assert torch.allclose(world.allreduce(first, op=world.Adasum), torch.ones(3))
    assert torch.equal(world.allreduce(torch.zeros(3), op=world.Adasum), torch.zeros(3))
    assert world.allreduce(torch.empty(0), op=world.Adasum).numel() == 0
    assert world.allreduce(torch.tensor(2.0), op=world.Adasum).shape == ()


def test_what_it_is_not_for(world: Any) -> None:
    if world.size() == 3:
        return
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=r"(?i)adasum"):
            world.allreduce(torch.ones(2).to(dtype), op=world.Adasum)
    with pytest.raises(world.MismatchError, match="the op is"):
        world.allreduce(torch.ones(2), op=world.Adasum if world.rank() else world.Sum)
    tensor = torch.ones(3, requires_grad=True)
    world.allreduce(tensor, op=world.Adasum).sum().backward()
    assert torch.allclose(tensor.grad, torch.ones(3))


def test_each_tensor_of_a_group_by_itself(world: Any) -> None:
    size, rank = world.size(), world.rank()
    if size == 3:
        return
    groups = [vectors(size, 5 + n, torch.float64, n) for n in range(4)]
    results = world.grouped_allreduce([tensors[rank] for tensors in groups], op=world.Adasum)
    handles = [world.allreduce_async(tensors[rank], op=world.Adasum) for tensors in groups]
    for tensors, result, handle in zip(groups, results, handles, strict=True):
        torch.testing.assert_close(result, of(tensors), rtol=1e-12, atol=1e-12)
        assert torch.equal(world.synchronize(handle), result)


def build() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def batch(rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(50 * rank + step)
    return torch.randn(4, 3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("passes", [1, 2])
def test_an_optimizers_steps(world: Any, kind: str, passes: int) -> None:
    """What each rank's optimizer made of its own gradients is combined; a single process plays all ranks."""
    size, rank = world.size(), world.rank()

    def make(net: nn.Module) -> torch.optim.Optimizer:
        if kind == "adamw":
            return torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
        return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9 if kind == "momentum" else 0.0)

    model = build()
    if size == 3:
        with pytest.raises(ValueError, match="power of two, not 3"):
            world.DistributedOptimizer(make(model), op=world.Adasum)
        return
    optimizer = world.DistributedOptimizer(
        make(model), model.named_parameters(), op=world.Adasum, backward_passes_per_step=passes
    )
    assert isinstance(optimizer, torch.optim.AdamW if kind == "adamw" else torch.optim.SGD)
    twins = [build() for _ in range(size)]
    plain = [make(twin) for twin in twins]
    for step in range(5):
        optimizer.zero_grad()
        for number in range(passes):
            model(batch(rank, 10 * step + number)).pow(2).mean().backward()
        optimizer.step()
        before = [param.detach().clone() for param in twins[0].parameters()]
        for owner, (twin, own) in enumerate(zip(twins, plain, strict=True)):
            own.zero_grad()
            for number in range(passes):
                twin(batch(owner, 10 * step + number)).pow(2).mean().backward()
            own.step()
        for index, start in enumerate(before):
            after = [list(twin.parameters())[index] for twin in twins]
            delta = adasum([(param.detach() - start).numpy() for param in after])
            for param in after:
                param.data.copy_(start + torch.from_numpy(delta))
        for mine, theirs in zip(model.parameters(), twins[0].parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_an_optimizers_steps_in_a_set_and_compressed(world: Any) -> None:
    size, rank = world.size(), world.rank()
    pair = world.add_process_set([0, 1]) if size > 2 else world.global_process_set
    if rank < 2:
        for compression, tolerance in ((world.Compression.none, 1e-12), (world.Compression.fp16, 1e-2)):
            model = build()
            before = copy.deepcopy(model)
            optimizer = world.DistributedOptimizer(
                torch.optim.SGD(model.parameters(), lr=0.1), op=world.Adasum, process_set=pair, compression=compression
            )
            model(batch(rank, 0)).sum().backward()
            optimizer.synchronize()
            with optimizer.skip_synchronize():
                optimizer.step()
            for mine, start in zip(model.parameters(), before.parameters(), strict=True):
                gathered = world.allgather((mine - start).detach().unsqueeze(0), process_set=pair)
                torch.testing.assert_close(gathered[0], gathered[1])
                local = world.allgather((-0.1 * mine.grad).unsqueeze(0), process_set=pair)
                want = adasum([delta.numpy() for delta in local])
                assert numpy.allclose(gathered[0].numpy(), want, rtol=tolerance, atol=tolerance)
    if size > 2:
        world.remove_process_set(pair)


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("scheduler", ["before", "after"])
def test_a_scaler_skips_on_all_ranks(world: Any, explicit: bool, scheduler: str) -> None:
    """An overflow on one rank alone; then all go on with one scale."""
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.ones(3))
    plain = torch.optim.AdamW([param], lr=0.1, fused=explicit)
    early = torch.optim.lr_scheduler.StepLR(plain, 1) if scheduler == "before" else None
    optimizer = world.DistributedOptimizer(plain, op=world.Adasum)
    late = early or torch.optim.lr_scheduler.StepLR(optimizer, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(3):
        optimizer.zero_grad()
        factor = float("inf") if step == 1 and world.rank() == 1 else 1.0
        scaler.scale((param * factor).sum()).backward()
        if explicit:
            scaler.unscale_(optimizer)
        before = param.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        late.step()
        assert torch.equal(before, param.detach()) == (step == 1)
        assert scaler.get_scale() == (4.0 if step >= 1 else 8.0)
    everyone = world.allgather(param.detach()[None])
    assert torch.equal(everyone, param.detach().expand_as(everyone))
