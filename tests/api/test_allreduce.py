"""All-reduce in all its forms, dtypes, shapes and ops, against plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.api.oracle import DTYPES, FORMS, close, everyones, reduced

pytestmark = pytest.mark.ranks(2, 3, 4)

SHAPES: list[tuple[int, ...]] = [(), (0,), (5,), (2, 0, 3), (3, 4)]


@pytest.mark.parametrize("form", FORMS)
def test_every_op_dtype_and_shape(world: Any, form: str) -> None:
    ops = (world.Average, world.Sum, world.Min, world.Max, world.Product)
    for number, dtype in enumerate(DTYPES):
        for shape in SHAPES:
            tensors = everyones(world.size(), shape, dtype, number)
            for op in ops:
                tensor = tensors[world.rank()].clone()
                result = FORMS[form](world, tensor, op=op)
                close(result, reduced(world, tensors, op))
                if form.endswith("_"):
                    assert result is tensor
                else:
                    assert torch.equal(tensor, tensors[world.rank()]) and result is not tensor


@pytest.mark.parametrize("form", FORMS)
def test_scale_factors(world: Any, form: str) -> None:
    for dtype in (torch.int32, torch.uint8, torch.float16, torch.bfloat16, torch.float64):
        tensors = [3 * tensor for tensor in everyones(world.size(), (7,), dtype)]
        for op in (world.Average, world.Sum, world.Max):
            for prescale, postscale in ((0.5, 1.0), (1.0, 2.5), (0.5, 3.0), (2.0, 0.25)):
                mine = tensors[world.rank()].clone()
                result = FORMS[form](world, mine, op=op, prescale_factor=prescale, postscale_factor=postscale)
                close(result, reduced(world, tensors, op, prescale, postscale))


@pytest.mark.parametrize("form", FORMS)
def test_not_contiguous(world: Any, form: str) -> None:
    size, rank = world.size(), world.rank()
    for view in (
        lambda t: t.t(),
        lambda t: t[:, ::2],
        lambda t: t[1:, 1:].t(),
        lambda t: t[:, 0],
        lambda t: t.view(2, 3, 2, 1).contiguous(memory_format=torch.channels_last),
    ):
        tensors = [everyones(size, (3, 4), torch.float32, 9 + r)[0] for r in range(size)]
        base = tensors[rank].clone()
        own = view(base)
        result = FORMS[form](world, own, op=world.Sum)
        assert torch.equal(result, sum(view(tensor) for tensor in tensors))
        if form.endswith("_"):
            assert torch.equal(own, result) and result is own


@pytest.mark.parametrize("form", FORMS)
def test_the_old_spelling(world: Any, form: str) -> None:
    tensors = everyones(world.size(), (4,), torch.float32)
    mine = tensors[world.rank()]
    close(FORMS[form](world, mine.clone()), reduced(world, tensors, world.Average))
    close(FORMS[form](world, mine.clone(), average=True), reduced(world, tensors, world.Average))
    close(FORMS[form](world, mine.clone(), average=False), reduced(world, tensors, world.Sum))
    with pytest.raises(ValueError, match="average"):
        FORMS[form](world, mine.clone(), average=True, op=world.Average)
    with pytest.raises(ValueError, match="op="):
        FORMS[form](world, mine.clone(), op=17)


def test_positional_arguments_as_in_horovod(world: Any) -> None:
    tensor, none = torch.ones(3), world.Compression.none
    rest = (world.Sum, 0.5, 4.0, world.global_process_set)
    assert world.allreduce(tensor, None, "a", none, *rest)[0] == 2 * world.size()
    assert world.synchronize(world.allreduce_async(tensor, None, "b", *rest))[0] == 2 * world.size()
    assert world.grouped_allreduce([tensor], None, "c", none, *rest)[0][0] == 2 * world.size()


@pytest.mark.parametrize("numel", [10, 30_000, 200_000])
def test_the_same_bits_on_all_ranks(world: Any, numel: int) -> None:
    generator = torch.Generator().manual_seed(world.rank())
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        mine = torch.randn(numel, generator=generator, dtype=torch.float64).to(dtype)
        for op in (world.Average, world.Sum, world.Product):
            result = world.allreduce(mine, op=op)
            everyone = world.allgather(result.unsqueeze(0))
            assert all(torch.equal(everyone[0], other) for other in everyone)


@pytest.mark.parametrize("numel", [6, 60_000])
def test_sixteen_bits_are_scaled_in_32(world: Any, numel: int) -> None:
    """An average whose sum fits, and scaling that would overflow or lose bits in 16."""
    size = world.size()
    for dtype in (torch.float16, torch.bfloat16):
        want = (torch.tensor(float(size * (size + 1) // 2)) / size).to(dtype)
        got = world.allreduce(torch.full((numel,), float(world.rank() + 1), dtype=dtype))
        torch.testing.assert_close(got, torch.full((numel,), want.item(), dtype=dtype), rtol=1e-2, atol=0)
    half = torch.full((numel,), 60000.0, dtype=torch.float16)
    got = world.allreduce(half, op=world.Sum, prescale_factor=1 / 8, postscale_factor=8 / size)
    assert torch.equal(got, half)


def test_integers(world: Any) -> None:
    """A sum of large integers is exact; averages truncate towards zero; scale factors are applied in float64."""
    size = world.size()
    large = torch.tensor([2**60 + 1, -(2**60) - 1, 2**53 + 1])
    assert torch.equal(world.allreduce(large, op=world.Sum), large * size)
    assert world.allreduce(torch.tensor([2**24 + 1], dtype=torch.int32)).item() == 2**24 + 1
    for value in (5, -5, 1, -1):
        mine = torch.tensor([value if world.rank() == 0 else 0])
        assert world.allreduce(mine).item() == int(value / size)
    scaled = world.allreduce(torch.tensor([7, -7]), op=world.Sum, prescale_factor=0.5)
    assert scaled.tolist() == [3 * size, -3 * size]


def test_bool(world: Any) -> None:
    first = torch.tensor([world.rank() == 0, True, False])
    assert world.allreduce(first, op=world.Max).tolist() == [True, True, False]
    assert world.allreduce_(first.clone(), op=world.Min).tolist() == [False, True, False]
    for op in (world.Sum, world.Average, world.Product):
        with pytest.raises(TypeError, match="bool"):
            world.allreduce(first, op=op)


@pytest.mark.parametrize("numel", [3, 40_000])
def test_the_gradient_of_an_average_and_of_a_sum(world: Any, numel: int) -> None:
    size, rank = world.size(), world.rank()
    weights = [torch.arange(1.0, numel + 1, dtype=torch.float64) * (r + 1) for r in range(size)]
    for op, factor in ((None, 1 / size), (world.Average, 1 / size), (world.Sum, 1.0)):
        for extra in ({}, {"prescale_factor": 0.5, "postscale_factor": 3.0}):
            tensor = torch.randn(numel, dtype=torch.float64).requires_grad_()
            result = world.allreduce(tensor, op=op, **extra)
            (result * weights[rank]).sum().backward()
            scale = 1.5 if extra else 1.0
            torch.testing.assert_close(tensor.grad, sum(weights) * factor * scale)
    tensor = torch.ones(numel, requires_grad=True)
    world.allreduce(tensor, average=False).sum().backward()
    assert torch.equal(tensor.grad, torch.full((numel,), float(size)))


def test_gradients_of_other_shapes_and_forms(world: Any) -> None:
    size = world.size()
    for shape in ((), (0,), (2, 3)):
        tensor = torch.ones(shape, requires_grad=True)
        world.allreduce(tensor, op=world.Sum).sum().backward()
        assert torch.equal(tensor.grad, torch.full(shape, float(size)))
    tensor = torch.ones(2, 3, requires_grad=True)
    world.allreduce(tensor.t(), op=world.Sum).t()[0].sum().backward()
    assert torch.equal(tensor.grad, torch.tensor([[size] * 3, [0] * 3], dtype=torch.float32))
    tensor = torch.ones(3, requires_grad=True)
    world.allreduce(tensor, compression=world.Compression.fp16).sum().backward()
    assert tensor.grad.dtype == torch.float32 and torch.equal(tensor.grad, torch.ones(3))
    tensor = torch.ones(3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(world.allreduce(tensor**2, op=world.Sum).sum(), tensor, create_graph=True)
    slope.sum().backward()
    assert torch.equal(tensor.grad, torch.full((3,), 2.0 * size, dtype=torch.float64))
    with torch.no_grad():
        assert not world.allreduce(tensor).requires_grad
    for op in (world.Min, world.Max, world.Product):
        tensor = torch.ones(3, requires_grad=True)
        with pytest.raises(NotImplementedError, match="differentiable"):
            world.allreduce(tensor, op=op).sum().backward()
    assert world.allreduce(torch.ones(1), op=world.Sum).item() == size


def test_in_place_on_a_parameter(world: Any) -> None:
    weight = torch.nn.Parameter(torch.full((3,), float(world.rank())))
    assert world.allreduce_(weight) is weight
    assert weight.requires_grad and weight.is_leaf
    close(weight.detach(), torch.full((3,), (world.size() - 1) / 2))


def test_the_input_of_an_asynchronous_one_may_be_changed_at_once(world: Any) -> None:
    tensor = torch.ones(1000)
    handles = []
    for number in range(20):
        handles.append(world.allreduce_async(tensor.fill_(number), op=world.Sum))
        grouped = world.grouped_allreduce_async([tensor], op=world.Sum)
        tensor.zero_()
        assert world.synchronize(grouped)[0][0] == number * world.size()
    assert [world.synchronize(handle)[0].item() for handle in handles] == [n * world.size() for n in range(20)]


def test_handles(world: Any) -> None:
    """poll says when; a finished handle stays finished, also after synchronize."""
    for handle in (
        world.allreduce_async(torch.ones(3)),
        world.allreduce_async_(torch.ones(30_000)),
        world.grouped_allreduce_async([torch.ones(2), torch.ones(3)]),
        world.allgather_async(torch.ones(1)),
        world.broadcast_async(torch.ones(1), 0),
        world.alltoall_async(torch.ones(world.size())),
        world.reducescatter_async(torch.ones(world.size())),
    ):
        assert world.poll(handle) in (True, False)
        first = world.synchronize(handle)
        assert world.poll(handle) is True and world.poll(handle) is True
        second = world.synchronize(handle)
        if not isinstance(first, list):
            first, second = [first], [second]
        assert all(a is b for a, b in zip(first, second, strict=True))


def test_torchs_modes(world: Any) -> None:
    """Neither inference mode nor autocast nor a default device changes what comes back, or what comes later."""
    size = world.size()
    for numel in (8, 40_000):
        with torch.inference_mode():
            pending = world.allreduce_async(torch.ones(numel), op=world.Sum)
            assert world.allreduce(torch.ones(numel), op=world.Sum)[0] == size
            mine, strided = torch.ones(numel), torch.ones(numel, 2)[:, 0]
            handles = [world.allreduce_async_(own, op=world.Sum) for own in (mine, strided)]
            handles += [world.broadcast_async_(mine.clone(), 0), world.reducescatter_async(mine.clone(), op=world.Sum)]
            assert world.allreduce_(torch.ones(2, numel).t(), op=world.Sum)[0, 0] == size
        assert world.synchronize(pending)[0] == size
        assert [world.synchronize(handle)[0].item() for handle in handles] == [size, size, 1, size]
        assert mine[0] == size and strided[0] == size
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert world.allreduce(torch.full((numel,), 1 + 2**-12), op=world.Max)[0] == 1 + 2**-12
        with torch.device("meta"):
            handle = world.allreduce_async(torch.ones(numel, device="cpu"), op=world.Sum)
            assert world.synchronize(handle)[0] == size
        weight = torch.ones(numel, requires_grad=True)
        world.allreduce(weight * 2, op=world.Sum).sum().backward()
        assert weight.grad[0] == 2 * size


def test_what_waits_and_what_does_not_may_meet(world: Any) -> None:
    """The same name: blocking on one rank, asynchronous or in place on the others."""
    for numel in (3, 20_000):
        for number in range(5):
            name, tensor = f"{numel} {number}", torch.ones(numel)
            if (world.rank() + number) % 2:
                result = world.allreduce(tensor, name=name, op=world.Sum)
            else:
                result = world.synchronize(world.allreduce_async_(tensor, name=name, op=world.Sum))
            assert result[0] == world.size()


def test_flags(world: Any) -> None:
    last = world.rank() == world.size() - 1
    assert world.any_rank(last) is True and world.any_rank(False) is False
    assert world.all_ranks(last) is False and world.all_ranks(True) is True


def test_a_world_of_one_within_a_process_set(world: Any) -> None:
    alone = [world.add_process_set([rank]) for rank in range(world.size())]
    mine = alone[world.rank()]
    tensor = torch.tensor([3.0, 5.0])
    for op in (world.Average, world.Sum, world.Min, world.Max, world.Product, world.Adasum):
        assert torch.equal(world.allreduce(tensor, op=op, process_set=mine), tensor)
    assert torch.equal(world.allgather(tensor, process_set=mine), tensor)
    assert torch.equal(world.alltoall(tensor, process_set=mine), tensor)
    assert torch.equal(world.reducescatter(tensor, process_set=mine), tensor)
    assert torch.equal(world.broadcast(tensor, world.rank(), process_set=mine), tensor)
    world.barrier(mine)
    assert all(world.remove_process_set(one) for one in alone)
