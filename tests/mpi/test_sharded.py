"""DistributedOptimizer(shard=True) on real ranks: it trains as without."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.mpi.training import ROWS, assert_close, assert_replicas_equal, batch, build, loss_of, part, shrink_buckets

pytestmark = pytest.mark.ranks(2, 3, 4)


def groups(net: nn.Module) -> list[dict[str, Any]]:
    """Two groups, whose parameters alternate in the model."""
    return [
        {"params": [p for p in net.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in net.parameters() if p.dim() <= 1], "lr": 0.003},
    ]


optim = torch.optim
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda params: optim.SGD(params, lr=0.1),
    "nesterov": lambda params: optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "dampened": lambda params: optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5, maximize=True),
    "adam": lambda params: optim.Adam(params, lr=0.01),
    "amsgrad": lambda params: optim.Adam(params, lr=0.01, amsgrad=True),
    "adamw": lambda params: optim.AdamW(params, lr=0.01),
    "adamw foreach": lambda params: optim.AdamW(params, lr=0.01, foreach=True),
    "adamw fused": lambda params: optim.AdamW(params, lr=0.01, fused=True),
    "adamw loop": lambda params: optim.AdamW(params, lr=0.01, fused=False),
    "adamw tensor lr": lambda params: optim.AdamW(params, lr=torch.tensor(0.01)),
    "adamax": lambda params: optim.Adamax(params, lr=0.01),
    "nadam": lambda params: optim.NAdam(params, lr=0.01),
    "radam": lambda params: optim.RAdam(params, lr=0.01),
    "rmsprop": lambda params: optim.RMSprop(params, lr=0.01, momentum=0.5, centered=True),
    "rprop": lambda params: optim.Rprop(params, lr=0.01),
    "adagrad": lambda params: optim.Adagrad(params, lr=0.01, initial_accumulator_value=0.1),
    "adadelta": lambda params: optim.Adadelta(params, lr=0.5),
    "asgd": lambda params: optim.ASGD(params, lr=0.01, t0=2),
}


def without_decay(kind: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rprop has no weight decay."""
    return [{k: v for k, v in g.items() if kind != "rprop" or k != "weight_decay"} for g in found]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("tiny_buckets", [True, False])
def test_equals_one_process_over_the_whole_batch(
    world: Any, kind: str, tiny_buckets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups, a scheduler, a parameter that no rank uses and some that are unused in some steps."""
    if tiny_buckets:
        shrink_buckets(monkeypatch)
    model, reference = build(), build()
    mine = OPTIMIZERS[kind](without_decay(kind, groups(model)))
    before = optim.lr_scheduler.ExponentialLR(mine, 0.9)
    optimizer = world.DistributedOptimizer(mine, model.named_parameters(), shard=True)
    plain = OPTIMIZERS[kind](without_decay(kind, groups(reference)))
    schedulers = [before, optim.lr_scheduler.ExponentialLR(plain, 0.9)]
    assert optimizer is mine and isinstance(optimizer, type(plain))
    for step in range(8):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        plain.zero_grad(set_to_none=step % 2 == 0)
        loss_of(model, part(world, batch(step)), step % 3 == 1).backward()
        loss_of(reference, batch(step), step % 3 == 1).backward()
        for one, other in zip(model.parameters(), reference.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None)
        optimizer.step()
        plain.step()
        for scheduler in schedulers:
            scheduler.step()
        assert_replicas_equal(world, model)
    assert_close(model, reference)


@pytest.mark.parametrize("kind", ["nesterov", "adamw", "rmsprop"])
def test_fifty_steps_leave_equal_replicas_and_the_bits_of_the_unsharded(world: Any, kind: str) -> None:
    """Sums of small integers are exact, so that both see the same gradients."""
    models = [build().float() for _ in range(2)]
    optimizers = [
        world.DistributedOptimizer(OPTIMIZERS[kind](net.parameters()), net.named_parameters(), shard=shard)
        for net, shard in zip(models, (True, False), strict=True)
    ]
    for step in range(50):
        for net, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(10 * step + world.rank())
            sum(
                (p * torch.randint(-8, 8, p.shape, generator=generator) * world.size()).sum() for p in net.parameters()
            ).backward()
            optimizer.step()
    assert_replicas_equal(world, models[0])
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        if kind == "nesterov":
            assert torch.equal(one, other)
        torch.testing.assert_close(one, other)


def test_nothing_but_the_shard_is_kept(world: Any) -> None:
    net = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128)).float()
    optimizer = world.DistributedOptimizer(optim.AdamW(net.parameters()), shard=True)
    net(torch.ones(1, 128)).sum().backward()
    optimizer.step()
    whole = 8 * sum(p.numel() for p in net.parameters())
    assert not optimizer.state
    assert optimizer._mpiddp_reducer.update.nbytes() <= whole / world.size() + 64 * 8
    assert all(not torch.isnan(p).any() for p in net.parameters())


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulation(world: Any, average: bool, set_to_none: bool) -> None:
    """Three backwards a step, and an early step after two."""
    model, reference = build(), build()
    optimizer = world.DistributedOptimizer(
        OPTIMIZERS["adamw"](model.parameters()),
        backward_passes_per_step=3,
        average_aggregated_gradients=average,
        shard=True,
    )
    plain = OPTIMIZERS["adamw"](reference.parameters())
    numbers = itertools.count()
    for passes in (3, 3, 2, 3):
        for _ in range(passes):
            rows = batch(next(numbers))
            loss_of(model, part(world, rows)).backward()
            (loss_of(reference, rows) / (passes if average else 1)).backward()
        optimizer.step()
        plain.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        plain.zero_grad(set_to_none=set_to_none)
        assert_replicas_equal(world, model)
    assert_close(model, reference)


@pytest.mark.parametrize("op", ["Average", "Sum"])
@pytest.mark.parametrize("whole", [False, True])
def test_several_backwards_add_up(world: Any, op: str, whole: bool) -> None:
    """Each exchanges what it added; gradients that nobody zeroed stay; some parameters get no second gradient."""
    if whole and op == "Sum":
        pytest.skip("whole sums cannot be told from what was added, and raise as without shard")
    model, reference = build(), build()
    optimizer = world.DistributedOptimizer(OPTIMIZERS["sgd"](model.parameters()), op=getattr(world, op), shard=True)
    plain = OPTIMIZERS["sgd"](reference.parameters())
    times = world.size() if op == "Sum" else 1
    for step in range(5):
        rows = batch(step)
        if step % 2 == 0:
            optimizer.zero_grad()
            plain.zero_grad()
        for number, net in enumerate((model, reference)):
            mine, factor = (part(world, rows), 0.1) if number == 0 else (rows, 0.1 * times)
            loss = loss_of(net, mine) * factor
            loss.backward(retain_graph=True)
            if whole and number == 0:
                optimizer.synchronize()
            (2 * loss).backward(create_graph=step == 3)
            (net(mine[0], True).pow(2).mean() * factor).backward()
        optimizer.step()
        plain.step()
        assert_replicas_equal(world, model)
    assert_close(model, reference)
    for net in (model, reference):
        net.zero_grad()


def test_used_on_one_rank_only(world: Any) -> None:
    used, unused = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        used.weight.fill_(1.0)
        unused.weight.fill_(1.0)
    params = [*used.parameters(), *unused.parameters()]
    optimizer = world.DistributedOptimizer(torch.optim.SGD(params, lr=1.0, weight_decay=1.0), shard=True)
    for _ in range(3):
        optimizer.zero_grad()
        loss = used(torch.ones(1, 2)).sum()
        if world.rank():
            loss = torch.ones(1, requires_grad=True).sum()  # no parameter takes part here
        loss.backward()
        optimizer.step()
        assert unused.weight.grad is None
    assert torch.equal(unused.weight, torch.ones(1, 2))
    assert torch.allclose(used.weight, torch.full((1, 2), -1 / world.size()))


def test_frozen_thawed_and_a_further_group(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buckets change while the optimizer has state, whose parts move to other ranks."""
    shrink_buckets(monkeypatch)
    model, reference = build(), build()
    optimizer = world.DistributedOptimizer(OPTIMIZERS["adamw"]([*model.last.parameters(), model.gain]), shard=True)
    plain = OPTIMIZERS["adamw"]([*reference.last.parameters(), reference.gain])
    for step in range(9):
        for net, wrapped in ((model, optimizer), (reference, plain)):
            if step == 2:
                wrapped.add_param_group({"params": list(net.first.parameters()), "lr": 0.02})
            if step == 6:
                wrapped.add_param_group({"params": list(net.skipped.parameters()), "weight_decay": 0.5})
            net.first.requires_grad_(step >= 4)
            net.last.requires_grad_(step != 5)
        if step != 6:
            model.zero_grad()
            reference.zero_grad()
        loss_of(model, part(world, batch(step))).backward()
        loss_of(reference, batch(step)).backward()
        optimizer.step()
        plain.step()
        assert_replicas_equal(world, model)
    assert_close(model, reference)


def test_a_layer_begins_to_be_trained_unannounced(world: Any) -> None:
    """On one rank before the others; its gradient comes after the buckets were laid out."""
    model, reference = build(), build()
    model.first.requires_grad_(False)
    optimizer = world.DistributedOptimizer(OPTIMIZERS["adamw"](model.parameters()), shard=True)
    plain = OPTIMIZERS["adamw"](reference.parameters())
    for step in range(5):
        optimizer.zero_grad()
        plain.zero_grad()
        if step >= 2:
            model.first.requires_grad_(step > 2 or world.rank() == 0)
        loss_of(model, part(world, batch(step))).backward()
        loss = loss_of(reference, part(world, batch(step)))
        loss.backward()
        for name, param in reference.named_parameters():
            is_first = name.startswith("first")
            if param.grad is None:
                continue
            if is_first and (step < 2 or (step == 2 and world.rank() > 0)):
                param.grad.zero_()
            world.allreduce_(param.grad)
            if is_first and step < 2:
                param.grad = None
        optimizer.step()
        plain.step()
        assert_replicas_equal(world, model)
    assert_close(model, reference)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_late_gradients(world: Any, use_reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer used in two checkpointed segments gets its second gradient when the first one is under way."""
    shrink_buckets(monkeypatch)

    def blocks() -> nn.ModuleList:
        torch.manual_seed(1)
        first = nn.Linear(8, 8)
        return nn.ModuleList([first, nn.Linear(8, 8), first, nn.Linear(8, 8)]).double()

    model, reference = blocks(), blocks()
    optimizer = world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), shard=True)
    plain = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        x = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        hidden, whole = x.chunk(world.size())[world.rank()].clone().requires_grad_(), x
        for block in model:
            hidden = checkpoint(lambda h, b=block: torch.tanh(b(h)), hidden * 1.0, use_reentrant=use_reentrant)
        for block in reference:
            whole = torch.tanh(block(whole))
        optimizer.zero_grad()
        plain.zero_grad()
        hidden.pow(2).mean().backward()
        whole.pow(2).mean().backward()
        optimizer.step()
        plain.step()
        assert_replicas_equal(world, model)
    assert_close(model, reference)


@pytest.mark.parametrize("name", ["fp16", "bf16", "own", "predivide", "groups"])
def test_options(world: Any, name: str) -> None:
    class Halved:
        def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
            return tensor / 2, None

        def decompress(self, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
            return tensor * 2

    model, reference = build(), build()
    options: dict[str, Any] = {
        "fp16": {"compression": world.Compression.fp16},
        "bf16": {"compression": world.Compression.bf16},
        "own": {"compression": Halved()},
        "predivide": {"gradient_predivide_factor": 2.0},
        "groups": {"num_groups": 3},
    }[name]
    optimizer = world.DistributedOptimizer(OPTIMIZERS["sgd"](model.parameters()), shard=True, **options)
    unsharded = world.DistributedOptimizer(OPTIMIZERS["sgd"](reference.parameters()), **options)
    for step in range(4):
        for net, wrapped in ((model, optimizer), (reference, unsharded)):
            wrapped.zero_grad()
            loss_of(net, part(world, batch(step))).backward()
            wrapped.step()
        assert_replicas_equal(world, model)
    rough = {"fp16": 1e-2, "bf16": 5e-2}.get(name, 1e-9)
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=rough, atol=rough)


def test_layouts_of_parameters(world: Any) -> None:
    """channels_last, transposed and empty parameters; two dtypes."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    odd = [nn.Parameter(torch.randn(5, 7).t()), nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.randn(9).double())]
    params = [*conv.parameters(), *odd]
    reference = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = world.DistributedOptimizer(torch.optim.AdamW(params, lr=0.1), shard=True)
    plain = torch.optim.AdamW(reference, lr=0.1)
    for _ in range(3):
        for own, theirs in zip(params, reference, strict=True):
            own.grad = torch.full_like(own, float(world.rank()))
            theirs.grad = torch.full_like(theirs, (world.size() - 1) / 2)
        optimizer.step()
        plain.step()
    for own, theirs in zip(params, reference, strict=True):
        torch.testing.assert_close(own, theirs)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_parameters_that_got_other_data(world: Any) -> None:
    model, reference = build(), build()
    optimizer = world.DistributedOptimizer(OPTIMIZERS["sgd"](model.parameters()), shard=True)
    plain = OPTIMIZERS["sgd"](reference.parameters())
    for step in range(4):
        if step == 2:
            for net in (model, reference):
                for param in net.parameters():
                    param.data = param.data * 2
        optimizer.zero_grad()
        plain.zero_grad()
        loss_of(model, part(world, batch(step))).backward()
        loss_of(reference, batch(step)).backward()
        optimizer.step()
        plain.step()
    assert_close(model, reference)
    optimizer.zero_grad()
    model.float()
    with pytest.raises((world.MpiddpError, RuntimeError)):
        nn.functional.mse_loss(model(torch.ones(1, 6)), torch.ones(1, 3)).backward()
        optimizer.step()


def test_a_process_set(world: Any) -> None:
    members = world.add_process_set(range(world.size() - 1))
    model, reference = build(), build()
    optimizer = world.DistributedOptimizer(
        OPTIMIZERS["adamw"](model.parameters()), process_set=members, shard=True, max_grad_norm=0.1
    )
    plain = OPTIMIZERS["adamw"](reference.parameters())
    for step in range(3):
        optimizer.zero_grad()
        plain.zero_grad()
        loss_of(model, batch(step)).backward()  # the same everywhere
        loss_of(reference, batch(step)).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        optimizer.step()
        plain.step()
    assert_close(model, reference)
    optimizer.consolidate_state_dict(to=0)
    if world.rank() in (0, world.size() - 1):
        assert optimizer.state_dict()["state"].keys() == plain.state_dict()["state"].keys()
    world.remove_process_set(members)


def test_a_closure_and_hooks(world: Any) -> None:
    model, reference = build(), build()
    optimizer = world.DistributedOptimizer(OPTIMIZERS["adamw"](model.parameters()), shard=True)
    plain = OPTIMIZERS["adamw"](reference.parameters())
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    for step in range(3):

        def closure(net: Any, wrapped: Any, rows: Any) -> torch.Tensor:
            wrapped.zero_grad()
            loss = loss_of(net, rows)
            loss.backward()
            return loss

        mine = part(world, batch(step))
        assert optimizer.step(lambda m=mine: closure(model, optimizer, m)).item() > 0
        plain.step(lambda s=step: closure(reference, plain, batch(s)))
        assert_replicas_equal(world, model)
    assert called == ["before", "after"] * 3
    assert_close(model, reference)
