"""DistributedOptimizer(shard=True): whole gradients, clipping, loss scaling, checkpoints, and what is refused."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from tests.mpi.test_sharded import OPTIMIZERS, groups
from tests.mpi.training import assert_close, assert_replicas_equal, batch, build, loss_of, part

pytestmark = pytest.mark.ranks(2, 3, 4)


def train(world: Any, net: nn.Module, optimizer: Any, steps: range) -> None:
    """With the ranks' shares of each batch; the unsharded and the sharded one alike."""
    for step in steps:
        optimizer.zero_grad()
        loss_of(net, part(world, batch(step)), step % 3 == 1).backward()
        optimizer.step()


def train_plain(net: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(net, batch(step), step % 3 == 1).backward()
        optimizer.step()


# -- gradients ---------------------------------------------------------------------------------------------------------


def test_a_gradient_that_lies_in_parts_cannot_be_read(world: Any) -> None:
    model = build()
    optimizer = world.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), shard=True
    )
    loss_of(model, part(world, batch(0))).backward()
    grad = model.last.weight.grad
    assert grad.shape == model.last.weight.shape and "last.weight" in repr(grad)
    for read in (
        grad.norm,
        grad.clone,
        lambda: grad + 1,
        lambda: grad.data,
        lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        lambda: nn.utils.clip_grad_value_(model.parameters(), 1.0),
    ):
        with pytest.raises(world.MpiddpError, match=r"synchronize\(\).*clip_grad_norm_"):
            read()
    optimizer.step()
    assert_replicas_equal(world, model)


def test_synchronize_gives_whole_gradients_and_step_uses_what_is_written_to_them(world: Any) -> None:
    model, reference = build(), build()
    optimizer = world.DistributedOptimizer(OPTIMIZERS["adamw"](model.parameters()), shard=True)
    plain = OPTIMIZERS["adamw"](reference.parameters())
    for step in range(5):
        optimizer.zero_grad()
        plain.zero_grad()
        loss_of(model, part(world, batch(step))).backward()
        loss_of(reference, batch(step)).backward()
        optimizer.synchronize()
        for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None)
            if theirs.grad is not None:
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-12)
        norms = [nn.utils.clip_grad_norm_(net.parameters(), 0.05) for net in (model, reference)]
        torch.testing.assert_close(*norms)
        for net in (model, reference):
            net.last.weight.grad = net.last.weight.grad * 3  # another tensor
            net.first.bias.grad.mul_(2)
            if step == 2:
                net.skipped.weight.grad = None
        with optimizer.skip_synchronize():
            optimizer.step()
        plain.step()
        assert_replicas_equal(world, model)
    assert_close(model, reference)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, float("inf")])
@pytest.mark.parametrize("whole", [False, True])
def test_clipping(world: Any, norm_type: float, whole: bool) -> None:
    model, reference = build(), build()
    optimizer = world.DistributedOptimizer(OPTIMIZERS["sgd"](groups(model)), shard=True)
    plain = OPTIMIZERS["sgd"](groups(reference))
    for step in range(4):
        optimizer.zero_grad()
        plain.zero_grad()
        loss_of(model, part(world, batch(step)), step % 2 == 1).backward()
        loss_of(reference, batch(step), step % 2 == 1).backward()
        if whole:
            optimizer.synchronize()
        most = 1e-3 if step < 3 else 1e3
        norm = optimizer.clip_grad_norm_(most, norm_type)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(reference.parameters(), most, norm_type))
        torch.testing.assert_close(optimizer.clip_grad_norm_(1e9, norm_type), norm.clamp(max=most), rtol=1e-2, atol=0)
        optimizer.step()
        plain.step()
        assert_replicas_equal(world, model)
    assert_close(model, reference)


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("closure", [False, True])
def test_max_grad_norm(world: Any, shard: bool, closure: bool) -> None:
    model, reference = build(), build()
    optimizer = world.DistributedOptimizer(OPTIMIZERS["sgd"](model.parameters()), shard=shard, max_grad_norm=0.01)
    plain = OPTIMIZERS["sgd"](reference.parameters())

    def backward(step: int) -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, part(world, batch(step)))
        loss.backward()
        return loss

    for step in range(4):
        plain.zero_grad()
        loss_of(reference, batch(step)).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
        plain.step()
        if closure:
            optimizer.step(lambda s=step: backward(s))
        else:
            backward(step)
            optimizer.step()
        assert_replicas_equal(world, model)
    assert_close(model, reference)


def test_a_norm_that_is_not_finite(world: Any) -> None:
    """On one rank's shard only; every rank is told."""
    weight = nn.Parameter(torch.ones(64 * world.size()))
    optimizer = world.DistributedOptimizer(torch.optim.SGD([weight], lr=0.1), shard=True)
    for norm_type in (2.0, float("inf")):
        for value in (float("nan"), float("inf")):
            optimizer.zero_grad()
            factor = torch.ones_like(weight)
            factor[-1] = value
            (weight * factor).sum().backward()
            norm = optimizer.clip_grad_norm_(1e9, norm_type)
            assert not torch.isfinite(norm) and torch.isnan(norm) == (value != value)
            with pytest.raises(RuntimeError, match="total norm"):
                optimizer.clip_grad_norm_(1.0, norm_type, error_if_nonfinite=True)
    with pytest.raises(ValueError, match="norm_type"):
        optimizer.clip_grad_norm_(1.0, 0.0)


@pytest.mark.parametrize("explicit", ["step", "unscale", "synchronize"])
@pytest.mark.parametrize("kind", ["nesterov", "adamw fused"])
def test_a_scaler_skips_on_all_ranks(world: Any, explicit: str, kind: str) -> None:
    """An infinity that appears on one rank's data, in one rank's shard."""
    model, reference = build().float(), build().float()
    optimizer = world.DistributedOptimizer(OPTIMIZERS[kind](model.parameters()), shard=True)
    plain = OPTIMIZERS[kind](reference.parameters())
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in range(2)]
    for step in range(7):
        bad = step == 2
        before = copy.deepcopy(model.state_dict())
        for number, (net, wrapped, scaler) in enumerate(
            zip((model, reference), (optimizer, plain), scalers, strict=True)
        ):
            x, y = part(world, batch(step)) if number == 0 else batch(step)
            x, y = x.float(), y.float()
            if bad and (number == 1 or world.rank() == world.size() - 1):
                x[0, 0] = float("inf")
            wrapped.zero_grad()
            scaler.scale(loss_of(net, (x, y))).backward()
            if explicit != "step":
                if number == 0 and explicit == "synchronize":
                    wrapped.synchronize()
                scaler.unscale_(wrapped)
                most = 0.05
                norm = (
                    wrapped.clip_grad_norm_(most) if number == 0 else nn.utils.clip_grad_norm_(net.parameters(), most)
                )
                assert bad or norm < 100
            scaler.step(wrapped)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) == bad
        assert_replicas_equal(world, model)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


# -- state -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nesterov", "amsgrad", "asgd", "nadam", "adamw fused"])
def test_checkpoints_are_those_of_the_class_itself(world: Any, kind: str) -> None:
    model, reference = build(), build()
    optimizer = world.DistributedOptimizer(OPTIMIZERS[kind](groups(model)), shard=True)
    plain = OPTIMIZERS[kind](groups(reference))
    train(world, model, optimizer, range(5))
    train_plain(reference, plain, range(5))
    with pytest.raises(world.MpiddpError, match=r"consolidate_state_dict\(to=0\)" if world.rank() == 0 else "to="):
        optimizer.state_dict()
    root = world.size() - 1
    optimizer.consolidate_state_dict(to=root)
    if world.rank() == root:
        saved, theirs = optimizer.state_dict(), plain.state_dict()
        assert saved["param_groups"] == theirs["param_groups"]
        assert saved["state"].keys() == theirs["state"].keys()
        for index, values in theirs["state"].items():
            assert list(saved["state"][index]) == list(values)
            for key, value in values.items():
                torch.testing.assert_close(saved["state"][index][key], value, rtol=1e-6, atol=1e-9)
                assert saved["state"][index][key].stride() == value.stride()
    else:
        with pytest.raises(world.MpiddpError, match=f"to={world.rank()}"):
            optimizer.state_dict()
    train(world, model, optimizer, range(5, 6))
    with pytest.raises(world.MpiddpError, match="after the last step"):
        optimizer.state_dict()
    with pytest.raises(ValueError, match="ranks are"):
        optimizer.consolidate_state_dict(to=world.size())


def test_round_trips_between_numbers_of_ranks(world: Any) -> None:
    """Saved here, loaded by one plain process, trained there, and loaded here again; then between sets of ranks."""
    model, reference = build(), build()
    optimizer = world.DistributedOptimizer(OPTIMIZERS["amsgrad"](groups(model)), shard=True)
    train(world, model, optimizer, range(4))
    optimizer.consolidate_state_dict(to=None)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    plain = OPTIMIZERS["amsgrad"](groups(reference))
    reference.load_state_dict(saved["model"])
    plain.load_state_dict(saved["optimizer"])
    train(world, model, optimizer, range(4, 7))
    train_plain(reference, plain, range(4, 7))
    assert_close(model, reference)

    fewer = world.add_process_set(range(world.size() - 1))
    for members in (fewer, world.global_process_set):
        fresh = build(1)
        again = OPTIMIZERS["amsgrad"](groups(fresh))
        wrapped = world.DistributedOptimizer(again, process_set=members, shard=True)
        fresh.load_state_dict(reference.state_dict())
        wrapped.load_state_dict(copy.deepcopy(plain.state_dict()))
        assert wrapped.state_dict()["state"].keys() == plain.state_dict()["state"].keys()
        other = copy.deepcopy(reference)
        twin = OPTIMIZERS["amsgrad"](groups(other))
        twin.load_state_dict(copy.deepcopy(plain.state_dict()))
        for step in range(7, 10):
            for net, each in ((fresh, wrapped), (other, twin)):
                each.zero_grad()
                loss_of(net, batch(step), step == 8).backward()  # the same everywhere
                each.step()
        assert_close(fresh, other)
    world.remove_process_set(fewer)


def test_a_wrapped_optimizer_keeps_its_state(world: Any) -> None:
    """It made some steps before it was wrapped, and loads an older state after some more."""
    model, reference = build(), build()
    mine, plain = OPTIMIZERS["nadam"](model.parameters()), OPTIMIZERS["nadam"](reference.parameters())
    train_plain(model, mine, range(3))
    train_plain(reference, plain, range(3))
    optimizer = world.DistributedOptimizer(mine, shard=True)
    early = copy.deepcopy(optimizer.state_dict())
    train(world, model, optimizer, range(3, 6))
    train_plain(reference, plain, range(3, 6))
    assert_close(model, reference)
    optimizer.load_state_dict(early)
    plain.load_state_dict(early)
    train(world, model, optimizer, range(6, 9))
    train_plain(reference, plain, range(6, 9))
    assert_close(model, reference)


def test_the_root_alone_has_loaded(world: Any) -> None:
    model, reference = build(world.rank()), build()
    plain = OPTIMIZERS["adamw"](reference.parameters())
    train_plain(reference, plain, range(3))
    optimizer = world.DistributedOptimizer(OPTIMIZERS["adamw"](model.parameters()), shard=True)
    if world.rank() == 0:
        model.load_state_dict(reference.state_dict())
        optimizer.load_state_dict(plain.state_dict())
        optimizer.param_groups[0]["lr"] = 0.02
    plain.param_groups[0]["lr"] = 0.02
    world.broadcast_parameters(model.state_dict(), 0)
    world.broadcast_optimizer_state(optimizer, 0)
    train(world, model, optimizer, range(3, 5))
    train_plain(reference, plain, range(3, 5))
    world.broadcast_parameters(model.state_dict(), 0)  # parameters are views; and the parts of the state stay
    world.broadcast_optimizer_state(optimizer, 0)
    train(world, model, optimizer, range(5, 8))
    train_plain(reference, plain, range(5, 8))
    assert_close(model, reference)


def test_the_root_alone_has_loaded_in_the_middle(world: Any) -> None:
    model, reference = build(), build()
    plain = OPTIMIZERS["adamw"](reference.parameters())
    train_plain(reference, plain, range(3))
    optimizer = world.DistributedOptimizer(OPTIMIZERS["adamw"](model.parameters()), shard=True)
    train(world, model, optimizer, range(2))
    optimizer.consolidate_state_dict(None)
    if world.rank() == 0:
        optimizer.load_state_dict(plain.state_dict())
    with pytest.raises(world.MpiddpError, match=r"ranks \[0\].*broadcast_optimizer_state"):
        optimizer.consolidate_state_dict(0)
    world.broadcast_optimizer_state(optimizer, 0)
    steps = {float(kept["step"]) for kept in optimizer.state_dict()["state"].values()}  # not what was consolidated
    assert max(steps) == 3
    model.load_state_dict(reference.state_dict())
    train(world, model, optimizer, range(3, 5))
    train_plain(reference, plain, range(3, 5))
    optimizer.consolidate_state_dict(0)
    assert_close(model, reference)


def test_copies_and_pickles(world: Any) -> None:
    model = build()
    optimizer = world.DistributedOptimizer(OPTIMIZERS["adam"](model.parameters()), shard=True)
    assert type(copy.deepcopy(optimizer)) is torch.optim.Adam
    train(world, model, optimizer, range(2))
    with pytest.raises(world.MpiddpError, match="consolidate_state_dict"):
        copy.deepcopy(optimizer)
    optimizer.consolidate_state_dict(to=None)
    twin = pickle.loads(pickle.dumps(optimizer))
    assert type(twin) is torch.optim.Adam and len(twin.state) == len(optimizer.state_dict()["state"])
    copy.deepcopy(model)


# -- refusals ----------------------------------------------------------------------------------------------------------


class Whole(torch.optim.Optimizer):
    """Normalizes each gradient: not element by element."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.data.add_(param.grad, alpha=-group["lr"])


class Derived(torch.optim.SGD):
    """A subclass of one that is known."""


def test_what_is_refused(world: Any) -> None:
    model = nn.Linear(4, 4, bias=False)
    known = {
        "Adafactor": torch.optim.Adafactor,
        "LBFGS": torch.optim.LBFGS,
        "SparseAdam": lambda params: torch.optim.SparseAdam(list(params)),
        "Whole.*is_elementwise": Whole,
    }
    if hasattr(torch.optim, "Muon"):
        known["Muon"] = torch.optim.Muon
    for name, make in known.items():
        with pytest.raises(ValueError, match=name):
            world.DistributedOptimizer(make(model.parameters()), shard=True)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="Adasum"):
        world.DistributedOptimizer(sgd, op=world.Adasum, shard=True)
    for wrong in (0, -1.0, float("nan"), True, "1"):
        with pytest.raises(ValueError, match="max_grad_norm"):
            world.DistributedOptimizer(sgd, max_grad_norm=wrong)
    with pytest.raises(ValueError, match="differentiable"):
        world.DistributedOptimizer(torch.optim.Adam(model.parameters(), differentiable=True), shard=True)


def test_a_class_may_say_that_it_is_elementwise(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Whole, "is_elementwise", True, raising=False)
    for make in (Whole, lambda params: Derived(params, lr=0.1)):
        weight = nn.Parameter(torch.zeros(5))
        optimizer = world.DistributedOptimizer(make([weight]), shard=True)
        (weight * world.rank()).sum().backward()
        optimizer.step()
        assert torch.allclose(weight, torch.full((5,), -0.1 * (world.size() - 1) / 2))


def test_sparse_gradients_raise_on_every_rank(world: Any) -> None:
    table = nn.Embedding(8, 4, sparse=True)
    dense = nn.Parameter(torch.zeros(4))
    optimizer = world.DistributedOptimizer(
        torch.optim.SGD([*table.parameters(), dense], lr=0.1), [("table", table.weight), ("dense", dense)], shard=True
    )
    with pytest.raises(ValueError, match=r"'table' is sparse.*sparse_as_dense"):
        loss = dense.sum()
        if world.rank() == 0:
            loss = loss + table(torch.tensor([1, 2])).sum()
        loss.backward()
    made_dense = nn.Embedding(8, 4, sparse=True)
    optimizer = world.DistributedOptimizer(
        torch.optim.SGD(made_dense.parameters(), lr=0.1), sparse_as_dense=True, shard=True
    )
    made_dense(torch.tensor([1, 2])).sum().backward()
    optimizer.step()


def test_join_raises_at_once(world: Any) -> None:
    weight = nn.Parameter(torch.zeros(5))
    optimizer = world.DistributedOptimizer(torch.optim.SGD([weight], lr=0.1), shard=True)
    weight.sum().backward()
    optimizer.step()
    with pytest.raises(world.MpiddpError, match="shard=True"):
        world.join()
    del optimizer
    assert 0 <= world.join() < world.size()


def test_zeroing_during_an_exchange_raises_and_a_failed_backward_can_be_finished(world: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for param in model.parameters():
        world.broadcast_(param.data, 0)
    optimizer = world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), shard=True)
    failing = [False]

    def fail(grad: torch.Tensor) -> None:
        if failing[0]:
            raise ValueError("on purpose")

    model[0].weight.register_hook(fail)
    for step in range(3):
        failing[0] = step == 1 and world.rank() == 0
        try:
            model(torch.ones(1, 2)).sum().backward()
        except ValueError:
            assert failing[0]
        optimizer.step()
        optimizer.zero_grad()
        assert_replicas_equal(world, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_half_precision(world: Any, dtype: torch.dtype, kind: str) -> None:
    make = {
        "adamw": lambda params: torch.optim.AdamW(params, lr=0.1, eps=1e-3),
        "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.5),  # of which torch has a fused kernel, too
    }[kind]
    models = [nn.Linear(4, 4).to(dtype) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for net in models:
        world.broadcast_parameters(net.state_dict(), 0)
    optimizers = [
        world.DistributedOptimizer(make(net.parameters()), shard=shard)
        for net, shard in zip(models, (True, False), strict=True)
    ]
    for _ in range(3):
        for net, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            net(torch.full((1, 4), float(world.rank()), dtype=dtype)).sum().backward()
            optimizer.step()
    assert_replicas_equal(world, models[0])
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=1e-2)


def test_an_elastic_state_goes_back(world: Any) -> None:
    model, reference = build(), build()
    optimizer = world.DistributedOptimizer(OPTIMIZERS["adamw"](model.parameters()), shard=True)
    plain = OPTIMIZERS["adamw"](reference.parameters())
    state = world.elastic.TorchState(model, optimizer)
    state.sync()
    train(world, model, optimizer, range(3))
    state.commit()
    train(world, model, optimizer, range(3, 5))
    state.restore()
    state.sync()
    train(world, model, optimizer, range(3, 6))
    train_plain(reference, plain, range(6))
    assert_close(model, reference)


@pytest.mark.ranks(1)
def test_alone_everything_is_whole(world: Any) -> None:
    """A script with shard=True runs without mpirun: gradients can be read, and the state is there."""
    model, reference = build(), build()
    optimizer = world.DistributedOptimizer(OPTIMIZERS["adamw"](groups(model)), shard=True)
    plain = OPTIMIZERS["adamw"](groups(reference))
    for step in range(3):
        for net, wrapped in ((model, optimizer), (reference, plain)):
            wrapped.zero_grad()
            loss_of(net, batch(step), step == 1).backward()
            loss_of(net, batch(step + 1), True).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            wrapped.step()
        assert optimizer.state_dict()["state"].keys() == plain.state_dict()["state"].keys()
        copy.deepcopy(optimizer)
    assert_close(model, reference)
