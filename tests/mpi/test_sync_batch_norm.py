"""SyncBatchNorm over shards gives what BatchNorm gives over the joined batch: outputs, gradients, statistics."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.ranks(1, 2, 3, 4)

KINDS: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
SHAPES = {2: (), 3: (4,), 4: (3, 5), 5: (2, 3, 2)}
CHANNELS = 6


def rows_of(size: int, uneven: bool) -> list[int]:
    """So many rows on each rank; uneven: the first rank has none, where it is not alone."""
    return [3 * rank + 5 * (size == 1) for rank in range(size)] if uneven else [4] * size


def shards(
    size: int, rows: Sequence[int], dims: int, dtype: torch.dtype = torch.float64, seed: int = 0, offset: float = 1.0
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(rows), CHANNELS, *SHAPES[dims])
    whole = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + offset
    return list(whole.to(dtype).split(list(rows)))


def pair(world: Any, dims: int, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    """A SyncBatchNorm and the BatchNorm that it is compared with, with the same random weights."""
    torch.manual_seed(1)
    reference = KINDS[dims](CHANNELS, **options).to(dtype)
    if reference.affine:
        nn.init.normal_(reference.weight)
        nn.init.normal_(reference.bias)
    return world.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(reference)), reference


def run(layer: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    output = layer(x)
    (output * weights).sum().backward()
    assert x.grad is not None
    return output.detach(), x.grad


def assert_like_joined(
    world: Any, layer: Any, reference: Any, batches: Sequence[list[torch.Tensor]], tol: float
) -> None:
    """Train both on ``batches``, each a list with a shard for each rank, and compare all that comes out."""
    rank = world.rank()
    for number, batch in enumerate(batches):
        weights = [
            torch.randn(x.shape, generator=torch.Generator().manual_seed(number + r)) for r, x in enumerate(batch)
        ]
        weights = [w.to(batch[0].dtype) for w in weights]
        for module in (layer, reference):
            module.zero_grad()
        output, grad = run(layer, batch[rank], weights[rank])
        joined, joined_grad = run(reference, torch.cat(batch), torch.cat(weights))
        rows = [x.shape[0] for x in batch]
        torch.testing.assert_close(output, joined.split(rows)[rank], rtol=tol, atol=tol)
        torch.testing.assert_close(grad, joined_grad.split(rows)[rank], rtol=tol, atol=tol)
        for mine, theirs in zip(layer.parameters(), reference.parameters(), strict=True):
            share = world.allreduce(mine.grad, op=world.Sum)
            torch.testing.assert_close(share, theirs.grad, rtol=tol, atol=tol * joined.numel())
    for (name, mine), theirs in zip(layer.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tol, atol=tol, msg=lambda m, n=name: f"{n}: {m}")
        everyone = world.allgather(mine.reshape(1, -1))
        assert all(torch.equal(everyone[0], other) for other in everyone), f"{name} differs between ranks"


@pytest.mark.parametrize("dims", KINDS)
@pytest.mark.parametrize("uneven", [False, True])
def test_equals_batch_norm_over_the_joined_batch(world: Any, dims: int, uneven: bool) -> None:
    size = world.size()
    layer, reference = pair(world, dims)
    rows = rows_of(size, uneven)
    batches = [shards(size, rows, dims, seed=step) for step in range(3)]
    assert_like_joined(world, layer, reference, batches, 1e-10)
    layer.eval()
    reference.eval()
    x = torch.randn(2, CHANNELS, *SHAPES[dims], dtype=torch.float64)
    torch.testing.assert_close(layer(x), reference(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [{"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.1, "momentum": 0.7}],
    ids=str,
)
def test_options(world: Any, options: dict[str, Any]) -> None:
    size = world.size()
    layer, reference = pair(world, 4, **options)
    batches = [shards(size, rows_of(size, True), 4, seed=step) for step in range(3)]
    assert_like_joined(world, layer, reference, batches, 1e-10)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_float32_and_a_mean_far_from_zero(world: Any, offset: float) -> None:
    size = world.size()
    layer, reference = pair(world, 4, torch.float64)
    layer.float()
    batch = shards(size, rows_of(size, True), 4, torch.float32, offset=offset)
    joined = reference(torch.cat(batch).double()).split([x.shape[0] for x in batch])[world.rank()]
    # Evaluating the formula costs eps * mean / deviation, in BatchNorm as well; the statistics must not add to that.
    torch.testing.assert_close(layer(batch[world.rank()]).double(), joined, rtol=1e-5, atol=1e-5 + 1e-6 * offset)
    torch.testing.assert_close(layer.running_mean.double(), reference.running_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), reference.running_var, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("whole", [False, True], ids=["mixed", "all 16-bit"])
def test_sixteen_bits_have_statistics_in_float32(world: Any, dtype: torch.dtype, whole: bool) -> None:
    size, rank = world.size(), world.rank()
    layer, reference = pair(world, 4, torch.float32)
    if whole:
        layer.to(dtype)
        reference.to(dtype).float()
    batch = shards(size, rows_of(size, True), 4, dtype, offset=20.0)
    rows = [x.shape[0] for x in batch]
    x = batch[rank].clone().requires_grad_()
    output = layer(x)
    weights = torch.randn(sum(rows), *x.shape[1:], generator=torch.Generator().manual_seed(5)).to(dtype).split(rows)
    output.backward(weights[rank])
    joined = torch.cat(batch).float().requires_grad_()
    expected = reference(joined)
    expected.backward(torch.cat(weights).float())
    assert output.dtype == dtype and x.grad is not None and joined.grad is not None
    resolution = torch.finfo(dtype).eps
    torch.testing.assert_close(output.float(), expected.split(rows)[rank], rtol=4 * resolution, atol=4 * resolution)
    torch.testing.assert_close(x.grad.float(), joined.grad.split(rows)[rank], rtol=4 * resolution, atol=4 * resolution)
    tol = resolution if whole else 1e-5
    torch.testing.assert_close(layer.running_mean.float(), reference.running_mean, rtol=tol, atol=tol)
    torch.testing.assert_close(layer.running_var.float(), reference.running_var, rtol=tol, atol=tol)


def test_under_autocast(world: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), world.SyncBatchNorm(CHANNELS), nn.Flatten(), nn.LazyLinear(2))
    model(torch.randn(2, 3, 6, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(torch.randn(2, 3, 6, 6))
        loss = output.float().square().sum()
    loss.backward()
    assert output.dtype == torch.bfloat16 and model[1].running_mean.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_channels_last_stays_channels_last(world: Any) -> None:
    x = torch.randn(3, CHANNELS, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    output = world.SyncBatchNorm(CHANNELS)(x)
    assert output.is_contiguous(memory_format=torch.channels_last)
    output.square().sum().backward()
    assert x.grad is not None and x.grad.is_contiguous(memory_format=torch.channels_last)


def test_within_a_process_set(world: Any) -> None:
    size, rank = world.size(), world.rank()
    if size < 3:
        return
    pairs = world.add_process_set([0, size - 1])
    if pairs.included():
        layer = world.SyncBatchNorm(CHANNELS, process_set=pairs).double()
        assert "ranks=" in repr(layer)
        batch = shards(2, [2, 5], 4)
        reference = nn.BatchNorm2d(CHANNELS).double()
        mine = layer(batch[pairs.rank()])
        torch.testing.assert_close(
            mine, reference(torch.cat(batch)).split([2, 5])[pairs.rank()], rtol=1e-10, atol=1e-10
        )
        torch.testing.assert_close(layer.running_var, reference.running_var, rtol=1e-10, atol=1e-10)
        assert copy.deepcopy(layer).process_set is pairs
    else:
        with pytest.raises(ValueError, match="no member"):
            world.SyncBatchNorm(CHANNELS, process_set=pairs)(torch.randn(2, CHANNELS))
        assert rank not in pairs.ranks
    world.barrier()
    world.remove_process_set(pairs)


def test_one_value_in_all_is_an_error_everywhere_and_two_are_enough(world: Any) -> None:
    size, rank = world.size(), world.rank()
    layer = world.SyncBatchNorm(3)
    with pytest.raises(ValueError, match="more than 1 value"):
        layer(torch.ones(1 if rank == size - 1 else 0, 3))
    assert torch.equal(layer.running_mean, torch.zeros(3))
    if size > 1:
        x = torch.full((1, 3), float(rank))
        expected = nn.BatchNorm1d(3)(torch.arange(size).float().view(-1, 1).expand(-1, 3))[rank]
        torch.testing.assert_close(layer(x)[0], expected)


def test_all_batches_empty(world: Any) -> None:
    layer = world.SyncBatchNorm(3)
    x = torch.ones(0, 3, 4, requires_grad=True)
    output = layer(x)
    output.sum().backward()
    assert output.shape == (0, 3, 4) and x.grad is not None and x.grad.shape == x.shape
    assert torch.equal(layer.running_mean, torch.zeros(3)) and torch.equal(layer.running_var, torch.ones(3))
    assert torch.equal(layer.weight.grad, torch.zeros(3))


def test_wrong_inputs_and_a_difference_between_ranks(world: Any) -> None:
    layer = world.SyncBatchNorm(3)
    with pytest.raises(ValueError, match="at least 2"):
        layer(torch.ones(3))
    if world.size() > 1:
        with pytest.raises(ValueError, match=r"3 features.*has 4"):
            layer(torch.ones(2, 4))
        channels = 3 if world.rank() == 0 else 4
        with pytest.raises(world.MismatchError, match=r"SyncBatchNorm\.forward"):
            world.SyncBatchNorm(channels)(torch.ones(2, channels))
        layer(torch.randn(2, 3))


def test_convert(world: Any) -> None:
    shared = nn.BatchNorm2d(4, momentum=0.3)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(shared, nn.ReLU(), nn.InstanceNorm2d(4)),
        shared, nn.BatchNorm2d(4, affine=False, track_running_stats=False, eps=0.5), nn.SyncBatchNorm(4),
    )  # fmt: skip
    model[2].eval()
    before = model.state_dict(keep_vars=True)
    names = list(before)
    converted = world.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted is model
    assert [type(m) for m in model.modules()].count(world.SyncBatchNorm) == 4
    assert model[2][0] is model[3] and not model[2][0].training and model[1].training and model[3].momentum == 0.3
    assert not model[4].affine and model[4].weight is None and model[4].running_mean is None and model[4].eps == 0.5
    assert type(model[2][2]) is nn.InstanceNorm2d
    after = model.state_dict(keep_vars=True)
    assert list(after) == names and all(after[name] is before[name] for name in names)
    alone = world.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(5))
    assert type(alone) is world.SyncBatchNorm and isinstance(alone, nn.modules.batchnorm._BatchNorm)
    with pytest.raises(ValueError, match="LazyBatchNorm1d"):
        world.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.LazyBatchNorm1d()))


def test_copies_and_pickles(world: Any) -> None:
    layer = copy.deepcopy(world.SyncBatchNorm(3))
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    x = torch.randn(2, 3)
    torch.testing.assert_close(loaded(x), layer(x))
    assert loaded.process_set is world.global_process_set
    nn.BatchNorm1d(3).load_state_dict(layer.state_dict())


def net(world: Any, sync: bool) -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
    )
    return world.SyncBatchNorm.convert_sync_batchnorm(model).double() if sync else model.double()


@pytest.mark.parametrize("how", ["plain", "checkpoint", "reentrant checkpoint", "frozen first layers"])
def test_training_equals_one_process(world: Any, how: str) -> None:
    size, rank = world.size(), world.rank()
    model, reference = net(world, True), net(world, False)
    optimizer = world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    if how == "frozen first layers":
        for part in (model, reference):
            part[0].requires_grad_(False)

    def loss(part: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if "checkpoint" in how:
            x = checkpoint(part[:4], x.requires_grad_(), use_reentrant="reentrant" in how)
            return part[4:](x).square().mean()
        return part(x).square().mean()

    for step in range(4):
        x = torch.randn(4 * size, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for part, update, rows in ((model, optimizer, x.chunk(size)[rank]), (reference, plain, x)):
            update.zero_grad()
            loss(part, rows.clone()).backward()
            update.step()
    for (name, mine), theirs in zip(model.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_a_rank_that_has_joined_counts_as_an_empty_batch(world: Any) -> None:
    size, rank = world.size(), world.rank()
    layer = world.SyncBatchNorm(CHANNELS).double()
    reference = nn.BatchNorm2d(CHANNELS).double()
    batch = shards(size, [4] * size, 4)
    if rank == size - 1 and size > 1:
        world.join()
        return
    present = batch if size == 1 else batch[:-1]
    output = layer(batch[rank])
    torch.testing.assert_close(output, reference(torch.cat(present)).split(4)[rank], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.running_var, reference.running_var, rtol=1e-10, atol=1e-10)
    world.join()


def test_compiled(world: Any) -> None:
    torch._dynamo.reset()
    model, reference = net(world, True), net(world, True)
    compiled = torch.compile(model, backend="eager")
    for step in range(2):
        x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + world.rank()))
        for part in (compiled, reference):
            part.zero_grad()
            part(x).square().sum().backward()
        for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-10)
    assert torch.equal(model[1].running_var, reference[1].running_var)


def test_before_init_and_without_training(world: Any) -> None:
    layer = world.SyncBatchNorm(3)
    world.shutdown()
    with pytest.raises(world.NotInitializedError):
        layer(torch.randn(2, 3))
    assert layer.eval()(torch.randn(2, 3)).shape == (2, 3)
    world.init()
