"""DistributedOptimizer on real ranks: equal replicas, and the numbers of one process over the whole batch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.mpi.training import ROWS, assert_close, assert_replicas_equal, batch, build, shard, shrink_buckets

pytestmark = pytest.mark.ranks(2, 3, 4)

STEPS = 6

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("tiny_buckets", [True, False])
def test_equals_one_process_over_the_whole_batch(
    world: Any, kind: str, set_to_none: bool, tiny_buckets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tiny_buckets:
        shrink_buckets(monkeypatch)
    model, reference = build(), build()
    optimizer = world.DistributedOptimizer(OPTIMIZERS[kind](model.parameters()), model.named_parameters())
    plain = OPTIMIZERS[kind](reference.parameters())
    for step in range(STEPS):
        x, y = batch(step)
        skip = step % 3 == 1
        optimizer.zero_grad(set_to_none=set_to_none)
        plain.zero_grad(set_to_none=set_to_none)
        nn.functional.mse_loss(model(shard(world, x), skip), shard(world, y)).backward()
        nn.functional.mse_loss(reference(x, skip), y).backward()
        for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None)
            if theirs.grad is not None:
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-12)
        optimizer.step()
        plain.step()
        assert_replicas_equal(world, model)
    assert_close(model, reference)


def test_a_gradient_is_a_view_of_its_bucket(world: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last), nn.Flatten(), nn.Linear(8, 2))
    optimizer = world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 3, 3)).sum().backward()
        buckets = optimizer._mpiddp_reducer.layout.buckets
        for param in model.parameters():
            assert any(param.grad is view for bucket in buckets for view in bucket.views)
            assert param.grad.stride() == param.stride()
        optimizer.step()


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulation(world: Any, average: bool, set_to_none: bool) -> None:
    """Three backwards a step, and an early step after two."""
    model, reference = build(), build()
    optimizer = world.DistributedOptimizer(
        OPTIMIZERS["sgd"](model.parameters()), backward_passes_per_step=3, average_aggregated_gradients=average
    )
    plain = OPTIMIZERS["sgd"](reference.parameters())
    numbers = itertools.count()
    for passes in (3, 3, 2, 3):
        for _ in range(passes):
            x, y = batch(next(numbers))
            nn.functional.mse_loss(model(shard(world, x)), shard(world, y)).backward()
            (nn.functional.mse_loss(reference(x), y) / (passes if average else 1)).backward()
        optimizer.step()
        plain.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        plain.zero_grad(set_to_none=set_to_none)
        assert_replicas_equal(world, model)
    assert_close(model, reference)


def test_passes_can_be_changed(world: Any) -> None:
    model = nn.Linear(1, 1, bias=False)
    optimizer = world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), backward_passes_per_step=2)
    x = torch.full((1, 1), float(world.rank()))
    mean = (world.size() - 1) / 2
    for passes in (2, 3, 1):
        optimizer.set_backward_passes_per_step(passes)
        for _ in range(passes):
            model(x).sum().backward()
        assert model.weight.grad.item() == pytest.approx(passes * mean)
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(ValueError, match="backward_passes_per_step"):
        optimizer.set_backward_passes_per_step(0)


def test_used_on_one_rank_only(world: Any) -> None:
    """Counts as zeros on the others, and is updated everywhere."""
    used, unused = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        used.weight.fill_(1.0)
    params = [*used.parameters(), *unused.parameters()]
    optimizer = world.DistributedOptimizer(torch.optim.SGD(params, lr=1.0))
    x = torch.ones(1, 2)
    for _ in range(3):
        optimizer.zero_grad()
        loss = used(x).sum() * 0 if world.rank() else used(x).sum()
        if world.rank():
            loss = torch.ones(1, requires_grad=True).sum()  # no parameter takes part here
        loss.backward()
        optimizer.step()
        assert torch.equal(used.weight.grad, torch.full((1, 2), 1 / world.size()))
        assert unused.weight.grad is None
    torch.testing.assert_close(used.weight.detach(), torch.full((1, 2), 1 - 3 / world.size()), atol=1e-6, rtol=0)


def test_frozen_and_thawed(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_buckets(monkeypatch)
    model, reference = build(), build()
    optimizer = world.DistributedOptimizer(OPTIMIZERS["sgd"](model.parameters()))
    plain = OPTIMIZERS["sgd"](reference.parameters())
    for step in range(STEPS):
        for net in (model, reference):
            net.first.requires_grad_(step >= 3)
            net.last.requires_grad_(step != 4)
        x, y = batch(step)
        optimizer.zero_grad()
        plain.zero_grad()
        nn.functional.mse_loss(model(shard(world, x)), shard(world, y)).backward()
        nn.functional.mse_loss(reference(x), y).backward()
        optimizer.step()
        plain.step()
        assert_replicas_equal(world, model)
    assert_close(model, reference)


def test_frozen_from_the_start_takes_no_room(world: Any) -> None:
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 1))
    model[0].requires_grad_(False)
    optimizer = world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    model(torch.randn(2, 100)).sum().backward()
    assert sum(bucket.flat.numel() for bucket in optimizer._mpiddp_reducer.layout.buckets) < 200
    optimizer.step()


@pytest.mark.parametrize("explicit", [True, False])
def test_clipping_sees_averages(world: Any, explicit: bool) -> None:
    model, reference = build(), build()
    optimizer = world.DistributedOptimizer(OPTIMIZERS["sgd"](model.parameters()))
    plain = OPTIMIZERS["sgd"](reference.parameters())
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        plain.zero_grad()
        nn.functional.mse_loss(model(shard(world, x)), shard(world, y)).backward()
        nn.functional.mse_loss(reference(x), y).backward()
        if explicit:
            optimizer.synchronize()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(reference.parameters(), 0.05), rtol=1e-6, atol=0)
        if explicit:
            with optimizer.skip_synchronize():
                optimizer.step()
        else:
            optimizer.step()
        plain.step()
        assert_replicas_equal(world, model)
    assert_close(model, reference)


def test_step_after_synchronize_warns_and_reduces_once(world: Any) -> None:
    model = nn.Linear(1, 1, bias=False)
    optimizer = world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), op=world.Sum)
    model(torch.ones(1, 1)).sum().backward()
    optimizer.synchronize()
    with pytest.warns(UserWarning, match="skip_synchronize"):
        optimizer.step()
    assert model.weight.grad.item() == world.size()


def test_an_infinity_on_one_rank_skips_the_step_on_all(world: Any) -> None:
    model = nn.Linear(2, 1)
    optimizer = world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    world.broadcast_(model.weight.data, 0)
    world.broadcast_(model.bias.data, 0)
    before = copy.deepcopy(model.state_dict())
    for step in range(3):
        optimizer.zero_grad()
        x = torch.ones(4, 2)
        if step == 1 and world.rank() == world.size() - 1:
            x[0, 0] = float("inf")
        scaler.scale(model(x).mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert world.allgather(torch.tensor([scaler.get_scale()])).unique().numel() == 1
        if step == 1:
            assert torch.equal(model.weight, before["weight"])
            assert scaler.get_scale() == 4.0
        before = copy.deepcopy(model.state_dict())
        assert_replicas_equal(world, model)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_checkpointing(world: Any, use_reentrant: bool, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first segment is checkpointed too, so with use_reentrant all hooks fire in nested backwards."""
    shrink_buckets(monkeypatch)

    def blocks() -> nn.ModuleList:
        torch.manual_seed(1)
        first = nn.Linear(8, 8)
        return nn.ModuleList([first, nn.Linear(8, 8), first if shared else nn.Linear(8, 8), nn.Linear(8, 8)]).double()

    model, reference, unused = blocks(), blocks(), nn.Linear(3, 3).double()
    optimizer = world.DistributedOptimizer(torch.optim.SGD([*model.parameters(), *unused.parameters()], lr=0.1))
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    for step in range(3):
        x = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        hidden = shard(world, x).clone().requires_grad_()
        for block in model:
            hidden = checkpoint(lambda h, b=block: torch.tanh(b(h)), hidden * 1.0, use_reentrant=use_reentrant)
        whole = x
        for block in reference:
            whole = torch.tanh(block(whole))
        optimizer.zero_grad()
        plain.zero_grad()
        hidden.pow(2).mean().backward()
        whole.pow(2).mean().backward()
        for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-12)
        assert unused.weight.grad is None
        optimizer.step()
        plain.step()
        assert_replicas_equal(world, model)
    assert_close(model, reference)


def test_create_graph(world: Any) -> None:
    """backward(create_graph=True), and a gradient penalty by autograd.grad."""
    model, reference = build(), build()
    optimizer = world.DistributedOptimizer(OPTIMIZERS["sgd"](model.parameters()))
    plain = OPTIMIZERS["sgd"](reference.parameters())
    for step in range(3):
        x, y = batch(step)
        for net, wrapped, rows, targets in (
            (model, optimizer, shard(world, x), shard(world, y)),
            (reference, plain, x, y),
        ):
            wrapped.zero_grad()
            inputs = rows.clone().requires_grad_()
            loss = nn.functional.mse_loss(net(inputs), targets)
            (slope,) = torch.autograd.grad(loss * len(rows), inputs, create_graph=True)
            (loss + slope.pow(2).sum(1).mean()).backward(create_graph=step == 2)
        optimizer.step()
        plain.step()
        assert_replicas_equal(world, model)
    assert_close(model, reference)


def test_several_backwards_of_one_graph(world: Any) -> None:
    """Each exchanges what it added."""
    model, reference = build(), build()
    optimizer = world.DistributedOptimizer(OPTIMIZERS["adamw"](model.parameters()))
    plain = OPTIMIZERS["adamw"](reference.parameters())
    for step in range(3):
        x, y = batch(step)
        for net, wrapped, rows, targets in (
            (model, optimizer, shard(world, x), shard(world, y)),
            (reference, plain, x, y),
        ):
            wrapped.zero_grad()
            loss = nn.functional.mse_loss(net(rows), targets)
            loss.backward(retain_graph=True)
            (2 * loss).backward()
            net(rows[:, :]).pow(2).mean().backward()
            wrapped.step()
        assert_replicas_equal(world, model)
    assert_close(model, reference)


def test_a_second_backward_onto_a_sum_raises(world: Any) -> None:
    model = nn.Linear(2, 1)
    optimizer = world.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), op=world.Sum
    )
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        assert torch.equal(model.bias.grad, torch.full((1,), float(world.size())))
    with pytest.raises(world.MpiddpError, match=r"'(weight|bias)'.*zero_grad"):
        model(torch.ones(1, 2)).sum().backward()
    world.barrier()


def test_two_optimizers_and_two_models(world: Any) -> None:
    """As in a GAN: each loss gives gradients to both."""
    nets, references = [build(1), build(2)], [build(1), build(2)]
    wrapped = [world.DistributedOptimizer(OPTIMIZERS["sgd"](net.parameters())) for net in nets]
    plain = [OPTIMIZERS["sgd"](net.parameters()) for net in references]
    for step in range(4):
        x, y = batch(step)
        for which in (0, 1):
            for models, optimizers, rows, targets in (
                (nets, wrapped, shard(world, x), shard(world, y)),
                (references, plain, x, y),
            ):
                for optimizer in optimizers:
                    optimizer.zero_grad()
                nn.functional.mse_loss(models[0](rows) * models[1](rows), targets).backward()
                optimizers[which].step()
    for net, reference in zip(nets, references, strict=True):
        assert_replicas_equal(world, net)
        assert_close(net, reference)


def test_schedulers_made_before_and_after(world: Any) -> None:
    for before in (True, False):
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        if before:
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        distributed = world.DistributedOptimizer(optimizer)
        if not before:
            scheduler = torch.optim.lr_scheduler.StepLR(distributed, 1, gamma=0.5)
        assert isinstance(distributed, torch.optim.SGD)
        model.weight.data.zero_()
        model.bias.data.zero_()
        for _ in range(3):
            distributed.zero_grad()
            model(torch.full((1, 2), float(world.rank()))).sum().backward()
            distributed.step()
            scheduler.step()
        assert distributed.param_groups[0]["lr"] == 0.125
        assert torch.allclose(model.weight, torch.full((1, 2), -1.75 * (world.size() - 1) / 2))
        assert_replicas_equal(world, model)


def test_gradients_set_by_hand(world: Any) -> None:
    """step() without a backward exchanges what lies in .grad."""
    weight = nn.Parameter(torch.zeros(3))
    optimizer = world.DistributedOptimizer(torch.optim.SGD([weight], lr=1.0))
    weight.grad = torch.full((3,), float(world.rank()))
    optimizer.step()
    assert torch.allclose(weight.detach(), torch.full((3,), -(world.size() - 1) / 2))


def test_a_closure(world: Any) -> None:
    model, reference = build(), build()
    optimizer = world.DistributedOptimizer(OPTIMIZERS["sgd"](model.parameters()))
    plain = OPTIMIZERS["sgd"](reference.parameters())
    for step in range(3):
        x, y = batch(step)

        def closure(net: Any, optimizer: Any, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(rows), targets)
            loss.backward()
            return loss

        mine, whole = (shard(world, x), shard(world, y)), (x, y)
        optimizer.step(lambda m=mine: closure(model, optimizer, *m))
        plain.step(lambda w=whole: closure(reference, plain, *w))
        assert_replicas_equal(world, model)
    assert_close(model, reference)


def test_a_further_param_group(world: Any) -> None:
    model, reference = build(), build()
    optimizer = world.DistributedOptimizer(OPTIMIZERS["sgd"](model.first.parameters()))
    plain = OPTIMIZERS["sgd"](reference.first.parameters())
    for step in range(4):
        if step == 2:
            optimizer.add_param_group({"params": list(model.last.parameters()), "lr": 0.01})
            plain.add_param_group({"params": list(reference.last.parameters()), "lr": 0.01})
        x, y = batch(step)
        model.zero_grad()
        reference.zero_grad()
        nn.functional.mse_loss(model(shard(world, x)), shard(world, y)).backward()
        nn.functional.mse_loss(reference(x), y).backward()
        optimizer.step()
        plain.step()
        assert_replicas_equal(world, model)
    assert_close(model, reference)


def test_wrapping_again_replaces_the_earlier_hooks(world: Any) -> None:
    model = nn.Linear(1, 1, bias=False)
    optimizer = world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), op=world.Sum)
    with pytest.raises(ValueError, match="already"):
        world.DistributedOptimizer(optimizer)
    optimizer = world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), op=world.Sum)
    model(torch.ones(1, 1)).sum().backward()
    assert model.weight.grad.item() == world.size()
    optimizer.step()


def test_different_models_raise_everywhere(world: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3 if world.rank() == 1 else 4))
    optimizer = world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    with pytest.raises(world.MismatchError, match=r"'1.weight'.*\(4, 2\) on rank 0.*\(3, 2\) on rank 1"):
        model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(world.MismatchError):
        optimizer.step()
    world.barrier()


def test_half_precision(world: Any) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = nn.Linear(4, 4).to(dtype)
        for param in model.parameters():
            world.broadcast_(param.data, 0)
        optimizer = world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.5))
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.full((1, 4), float(world.rank()), dtype=dtype)).sum().backward()
            expected = torch.full((4, 4), (world.size() - 1) / 2, dtype=dtype)
            torch.testing.assert_close(model.weight.grad, expected, rtol=1e-2, atol=0)
            optimizer.step()
        assert_replicas_equal(world, model)


def test_buckets_leave_while_backward_goes_on(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exchange of the last layers begins before the gradients of the first ones exist."""
    from mpiddp import trace

    shrink_buckets(monkeypatch)
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(6)])
    optimizer = world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    happened: list[str] = []
    for index, layer in enumerate(model):
        layer.weight.register_hook(lambda _, i=index: happened.append(f"gradient {i}"))
    for _ in range(2):
        happened.clear()
        sink = lambda event: happened.append(f"{event.phase} {event.args['name']}") if event.args else None  # noqa: E731
        trace.add_sink(sink)
        optimizer.zero_grad()
        model(torch.randn(3, 16)).sum().backward()
        trace.remove_sink(sink)
        optimizer.step()
    assert happened.index("B bucket 0") < happened.index("gradient 3")
    assert happened.index("E bucket 0") < happened.index("E bucket 5")


def test_no_gradient_memory_beyond_the_buckets(world: Any) -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
    optimizer = world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(3, 64)).sum().backward()
        optimizer.step()
    gradients = sum(p.numel() for p in model.parameters())
    held = {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(held.values()) <= 4 * gradients + 64 * len(list(model.parameters())) + 256


def test_names_are_checked(world: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="more than once"):
        world.DistributedOptimizer(optimizer, [("a", p) for p in model.parameters()])
    with pytest.raises(ValueError, match="2 of the optimizer's 4"):
        world.DistributedOptimizer(optimizer, model[0].named_parameters())
    with pytest.raises(ValueError, match="pairs"):
        world.DistributedOptimizer(optimizer, model.parameters())
    with pytest.raises(ValueError, match="LBFGS"):
        world.DistributedOptimizer(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match="averaged or summed"):
        world.DistributedOptimizer(optimizer, op=world.Max)


def test_a_backward_that_fails_can_be_finished(world: Any) -> None:
    """One rank's backward raises half-way, is caught, and the ranks stay in step."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    failing = [False]

    def fail(grad: torch.Tensor) -> None:
        if failing[0]:
            raise ValueError("on purpose")

    model[0].weight.register_hook(fail)
    for net in model.parameters():
        world.broadcast_(net.data, 0)
    for step in range(3):
        failing[0] = step == 1 and world.rank() == 0
        try:
            model(torch.ones(1, 2)).sum().backward()
        except ValueError:
            assert failing[0]
            optimizer.synchronize()
            with optimizer.skip_synchronize():
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
        assert_replicas_equal(world, model)


def test_copies_and_pickles_are_plain(world: Any) -> None:
    import pickle

    model = nn.Linear(2, 2)
    optimizer = world.DistributedOptimizer(torch.optim.Adam(model.parameters()))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(twin) is torch.optim.Adam
        assert twin.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
