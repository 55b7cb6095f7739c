"""All-gather, broadcast, alltoall and reduce-scatter: what moves rows, and their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.api.oracle import DTYPES, close, everyones, reduced, scaled

pytestmark = pytest.mark.ranks(2, 3, 4)

GATHERS = {
    "allgather": lambda w, t, **k: w.allgather(t, **k),
    "allgather_async": lambda w, t, **k: w.synchronize(w.allgather_async(t, **k)),
    "grouped_allgather": lambda w, t, **k: w.grouped_allgather([t, t], **k)[1],
    "grouped_allgather_async": lambda w, t, **k: w.synchronize(w.grouped_allgather_async([t], **k))[0],
}
BROADCASTS = {
    "broadcast": lambda w, t, r, **k: w.broadcast(t, r, **k),
    "broadcast_": lambda w, t, r, **k: w.broadcast_(t, r, **k),
    "broadcast_async": lambda w, t, r, **k: w.synchronize(w.broadcast_async(t, r, **k)),
    "broadcast_async_": lambda w, t, r, **k: w.synchronize(w.broadcast_async_(t, r, **k)),
}
ALLTOALLS = {
    "alltoall": lambda w, *a, **k: w.alltoall(*a, **k),
    "alltoall_async": lambda w, *a, **k: w.synchronize(w.alltoall_async(*a, **k)),
}
SCATTERS = {
    "reducescatter": lambda w, t, **k: w.reducescatter(t, **k),
    "reducescatter_async": lambda w, t, **k: w.synchronize(w.reducescatter_async(t, **k)),
    "grouped_reducescatter": lambda w, t, **k: w.grouped_reducescatter([t, t], **k)[1],
    "grouped_reducescatter_async": lambda w, t, **k: w.synchronize(w.grouped_reducescatter_async([t], **k))[0],
}


def ramp(rank: int, rows: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A rank's rows, each element its own."""
    numel = rows * torch.Size(shape).numel()
    return ((torch.arange(numel) + 7 * rank) % (2 if dtype is torch.bool else 100)).to(dtype).view(rows, *shape)


# -- all-gather --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", GATHERS)
def test_allgather(world: Any, form: str) -> None:
    """Equal rows, ragged rows, and none at all on some ranks or on all."""
    size, rank = world.size(), world.rank()
    for dtype in (*DTYPES, torch.bool):
        for shape in ((), (3,), (2, 2), (0,)):
            for lengths in ([2] * size, list(range(size)), [5 * (r == 1) for r in range(size)], [0] * size):
                parts = [ramp(r, lengths[r], shape, dtype) for r in range(size)]
                result = GATHERS[form](world, parts[rank].clone())
                assert result.dtype == dtype and torch.equal(result, torch.cat(parts))
    assert GATHERS[form](world, torch.tensor(10 * rank)).tolist() == [10 * r for r in range(size)]
    base = torch.arange(12.0).view(3, 4) + 100 * rank
    want = torch.cat([(torch.arange(12.0).view(3, 4) + 100 * r).t()[::2] for r in range(size)])
    assert torch.equal(GATHERS[form](world, base.t()[::2]), want)


def test_a_large_ragged_allgather(world: Any) -> None:
    size, rank = world.size(), world.rank()
    parts = [torch.full((40_000 * r + 3, 2), float(r)) for r in range(size)]
    assert torch.equal(world.allgather(parts[rank]), torch.cat(parts))


@pytest.mark.parametrize("form", ["allgather", "grouped_allgather"])
def test_the_gradient_of_an_allgather(world: Any, form: str) -> None:
    """The average over the ranks of the gradients of this rank's own rows."""
    size, rank = world.size(), world.rank()
    for lengths in ([2] * size, list(range(size)), [4 if r == 0 else 0 for r in range(size)]):
        tensor = torch.ones(lengths[rank], 3, requires_grad=True)
        gathered = GATHERS[form](world, tensor)
        assert gathered.requires_grad
        weight = torch.arange(1.0, sum(lengths) * 3 + 1).view(-1, 3)
        (gathered * weight * (rank + 1)).sum().backward()
        begin = sum(lengths[:rank])
        want = weight[begin : begin + lengths[rank]] * (size + 1) / 2
        torch.testing.assert_close(tensor.grad, want)
    scalar = torch.tensor(1.0, requires_grad=True)
    (GATHERS[form](world, scalar) * torch.arange(1.0, size + 1)).sum().backward()
    assert scalar.grad.shape == () and scalar.grad.item() == rank + 1
    strided = torch.ones(2, 3, requires_grad=True)
    GATHERS[form](world, strided.t()).sum().backward()
    assert torch.equal(strided.grad, torch.ones(2, 3))


# -- broadcast ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", BROADCASTS)
def test_broadcast(world: Any, form: str) -> None:
    size, rank = world.size(), world.rank()
    for root in range(size):
        for dtype in (*DTYPES, torch.bool):
            for rows, shape in ((1, ()), (0, (2,)), (3, (2,)), (5, ())):
                tensor = ramp(rank, rows, shape, dtype)
                result = BROADCASTS[form](world, tensor, root)
                assert torch.equal(result, ramp(root, rows, shape, dtype)) and result.dtype == dtype
                assert (result is tensor) == form.endswith("_")
                assert form.endswith("_") or torch.equal(tensor, ramp(rank, rows, shape, dtype))
        scalar = torch.tensor(float(rank))
        assert BROADCASTS[form](world, scalar, root).item() == root
        base = torch.arange(6.0).view(2, 3) * (rank + 1)
        result = BROADCASTS[form](world, base.t(), root)
        assert torch.equal(result, (torch.arange(6.0).view(2, 3) * (root + 1)).t())
    with pytest.raises(ValueError, match=rf"root_rank={size}.*0 to {size - 1}"):
        BROADCASTS[form](world, torch.ones(1), size)
    with pytest.raises(ValueError, match="root_rank=-1"):
        BROADCASTS[form](world, torch.ones(1), -1)


def test_the_gradient_of_a_broadcast(world: Any) -> None:
    """The root gets the average, the others zeros."""
    size, rank = world.size(), world.rank()
    for root in range(size):
        tensor = torch.ones(2, 3, requires_grad=True)
        (world.broadcast(tensor, root) * (rank + 1)).sum().backward()
        want = (size + 1) / 2 if rank == root else 0.0
        assert torch.equal(tensor.grad, torch.full((2, 3), want))


# -- alltoall ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ALLTOALLS)
def test_alltoall_in_equal_parts(world: Any, form: str) -> None:
    size, rank = world.size(), world.rank()
    for dtype in (*DTYPES, torch.bool):
        for shape in ((), (3,), (0,)):
            parts = [ramp(r, 2 * size, shape, dtype) for r in range(size)]
            result = ALLTOALLS[form](world, parts[rank])
            assert torch.equal(result, torch.cat([part[2 * rank : 2 * rank + 2] for part in parts]))
    assert ALLTOALLS[form](world, torch.empty(0, 3)).shape == (0, 3)
    with pytest.raises(ValueError, match=f"{size} equal parts"):
        ALLTOALLS[form](world, torch.ones(size + 1))
    with pytest.raises(ValueError, match="scalar"):
        ALLTOALLS[form](world, torch.tensor(1.0))


@pytest.mark.parametrize("form", ALLTOALLS)
def test_alltoall_with_splits(world: Any, form: str) -> None:
    """Rank r sends (r + s) rows to rank s; a rank may send or get nothing."""
    size, rank = world.size(), world.rank()
    tables = [
        [[r + s for s in range(size)] for r in range(size)],
        [[3 if s == 0 else 0 for s in range(size)] for r in range(size)],
        [[2 if r == 1 else 0 for s in range(size)] for r in range(size)],
        [[0] * size] * size,
    ]
    for splits in tables:
        for given in (splits[rank], torch.tensor(splits[rank]), torch.tensor(splits[rank], dtype=torch.int32)):
            for shape, dtype in (((2,), torch.float32), ((), torch.int64)):
                parts = [ramp(r, sum(splits[r]), shape, dtype) for r in range(size)]
                output, received = ALLTOALLS[form](world, parts[rank], given)
                want = [part[sum(splits[r][:rank]) : sum(splits[r][: rank + 1])] for r, part in enumerate(parts)]
                assert torch.equal(output, torch.cat(want))
                assert received.tolist() == [splits[r][rank] for r in range(size)]
                assert not received.is_floating_point() and received.device.type == "cpu"
    base = torch.arange(2.0 * size).view(2, size).t()
    output, _ = ALLTOALLS[form](world, base, [1] * size)
    assert torch.equal(output, base[rank : rank + 1].expand(size, 2))
    lists = ([1] * (size + 1), [size] * size, [-1, *[2] * (size - 1)])
    for wrong in (*lists, torch.ones(size), torch.ones(1, size).int()):
        with pytest.raises(ValueError, match="splits must be"):
            ALLTOALLS[form](world, torch.ones(size), wrong)


def test_the_gradient_of_an_alltoall(world: Any) -> None:
    """Each row's gradient goes back to where the row came from."""
    size, rank = world.size(), world.rank()
    tensor = torch.ones(size, 2, requires_grad=True)
    (world.alltoall(tensor) * (rank + 1)).sum().backward()
    assert torch.equal(tensor.grad, torch.arange(1.0, size + 1).view(-1, 1).expand(size, 2))
    splits = [rank + s for s in range(size)]
    tensor = torch.ones(sum(splits), requires_grad=True)
    output, received = world.alltoall(tensor, splits)
    assert output.requires_grad and not received.requires_grad
    (output * (rank + 1)).sum().backward()
    assert tensor.grad.tolist() == [float(s + 1) for s in range(size) for _ in range(splits[s])]


# -- reduce-scatter ----------------------------------------------------------------------------------------------------


def share(rows: int, size: int, rank: int) -> slice:
    """The rows of a rank: the first ones take one more."""
    base, extra = divmod(rows, size)
    begin = rank * base + min(rank, extra)
    return slice(begin, begin + base + (rank < extra))


@pytest.mark.parametrize("form", SCATTERS)
def test_reducescatter(world: Any, form: str) -> None:
    """Even and uneven rows, fewer rows than ranks, and none."""
    size, rank = world.size(), world.rank()
    for number, dtype in enumerate(DTYPES):
        for rows in (2 * size, 2 * size + 1, 3 * size - 1, 1, 0):
            for shape in ((), (3,), (0,)):
                tensors = everyones(size, (rows, *shape), dtype, number)
                for op in (world.Average, world.Sum, world.Min, world.Max, world.Product):
                    mine = tensors[rank].clone()
                    result = SCATTERS[form](world, mine, op=op)
                    close(result, reduced(world, tensors, op)[share(rows, size, rank)])
                    assert torch.equal(mine, tensors[rank])
    close(SCATTERS[form](world, mine), reduced(world, tensors, world.Average)[share(0, size, rank)])
    base = torch.arange(10.0).view(2, 5) * (rank + 1)
    want = torch.arange(10.0).view(2, 5).t() * (size * (size + 1) / 2)
    assert torch.equal(SCATTERS[form](world, base.t(), op=world.Sum), want[share(5, size, rank)])


@pytest.mark.parametrize("form", SCATTERS)
def test_the_scale_factors_of_a_reducescatter(world: Any, form: str) -> None:
    size, rank = world.size(), world.rank()
    for dtype in (torch.int32, torch.float16, torch.float64):
        tensors = [3 * tensor for tensor in everyones(size, (7, 2), dtype)]
        for op in (world.Average, world.Sum, world.Max):
            for prescale, postscale in ((0.5, 1.0), (1.0, 2.5), (0.5, 3.0)):
                result = SCATTERS[form](
                    world, tensors[rank].clone(), op=op, prescale_factor=prescale, postscale_factor=postscale
                )
                close(result, reduced(world, tensors, op, prescale, postscale)[share(7, size, rank)])
    assert scaled(torch.tensor([3]), 0.5).item() == 1


@pytest.mark.parametrize("form", SCATTERS)
def test_what_a_reducescatter_refuses(world: Any, form: str) -> None:
    with pytest.raises(ValueError, match="scalar"):
        SCATTERS[form](world, torch.tensor(1.0))
    with pytest.raises(ValueError, match="Adasum"):
        SCATTERS[form](world, torch.ones(4), op=world.Adasum)
    with pytest.raises(TypeError, match="bool"):
        SCATTERS[form](world, torch.ones(4, dtype=torch.bool))
    assert SCATTERS[form](world, torch.ones(world.size()), op=world.Sum).tolist() == [world.size()]


@pytest.mark.parametrize("form", ["reducescatter", "grouped_reducescatter"])
def test_the_gradient_of_a_reducescatter(world: Any, form: str) -> None:
    """The gradients gathered; times the size for a sum."""
    size, rank = world.size(), world.rank()
    for rows in (2 * size, 2 * size + 1, 1):
        shares = [len(range(rows)[share(rows, size, r)]) for r in range(size)]
        want = torch.cat([torch.full((shares[r], 2), r + 1.0) for r in range(size)])
        for op, factor in ((world.Average, 1), (world.Sum, size)):
            tensor = torch.ones(rows, 2, requires_grad=True)
            result = SCATTERS[form](world, tensor, op=op)
            assert result.requires_grad
            (result * (rank + 1)).sum().backward()
            assert torch.equal(tensor.grad, want * factor)
    tensor = torch.ones(size, requires_grad=True)
    result = SCATTERS[form](world, tensor, op=world.Sum, compression=world.Compression.fp16)
    assert result.dtype == torch.float32
    result.sum().backward()
    assert torch.equal(tensor.grad, torch.full((size,), float(size)))
    with pytest.raises(NotImplementedError, match="differentiable"):
        SCATTERS[form](world, torch.ones(size, requires_grad=True), op=world.Max).sum().backward()
