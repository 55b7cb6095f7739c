"""The public collectives on real ranks: shapes, dtypes, ops, errors, overlap, and progress when nobody pushes."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch

from mpiddp.dtypes import REDUCIBLE

pytestmark = pytest.mark.ranks(2, 3, 4)

DTYPES = sorted(REDUCIBLE, key=str)
SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (3, 0, 2), (17,), (2, 3, 5), (40_000,)]


def mine(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 4, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_allreduce_sums(world: Any, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        tensors = [mine(rank, shape, dtype) for rank in range(world.size())]
        tensor = tensors[world.rank()].clone()
        result = world.allreduce(tensor, op=world.Sum)
        want = torch.stack(tensors).sum(0).to(dtype)
        assert result.dtype == dtype and result.shape == want.shape and torch.equal(result, want)
        assert torch.equal(tensor, tensors[world.rank()])
        assert world.allreduce_(tensor, op=world.Sum) is tensor and torch.equal(tensor, want)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if not d.is_complex], ids=str)
def test_min_max_product(world: Any, dtype: torch.dtype) -> None:
    tensors = torch.stack([mine(rank, (50,), dtype) for rank in range(world.size())])
    tensor = tensors[world.rank()]
    assert torch.equal(world.allreduce(tensor, op=world.Min), tensors.amin(0))
    assert torch.equal(world.allreduce(tensor, op=world.Max), tensors.amax(0))
    assert torch.equal(world.allreduce(tensor, op=world.Product), tensors.to(torch.float64).prod(0).to(dtype))


def test_average_is_the_default_and_integers_are_truncated(world: Any) -> None:
    rank, size = world.rank(), world.size()
    assert world.allreduce(torch.tensor([float(rank)])).item() == pytest.approx((size - 1) / 2)
    for value in (7, -7):
        total = sum(value + other for other in range(size))
        result = world.allreduce(torch.tensor([value + rank]))
        assert result.dtype == torch.int64 and result.item() == int(total / size)
    assert world.allreduce(torch.tensor([5]), average=False).item() == 5 * size
    assert world.allreduce(torch.tensor([5]), average=True).item() == 5
    with pytest.raises(ValueError, match="deprecated"):
        world.allreduce(torch.ones(1), average=True, op=world.Sum)


def test_scale_factors(world: Any) -> None:
    size = world.size()
    tensor = torch.full((3,), 4.0)
    assert world.allreduce(tensor, op=world.Sum, prescale_factor=0.5, postscale_factor=3.0)[0] == 6.0 * size
    assert torch.equal(tensor, torch.full((3,), 4.0))
    half = torch.full((3,), 60000.0, dtype=torch.float16)
    assert world.allreduce(half, op=world.Sum, prescale_factor=1 / 8, postscale_factor=8.0 / size)[0] == 60000.0
    assert world.allreduce(torch.tensor([5]), op=world.Sum, prescale_factor=0.5)[0] == 2 * size


def test_bool_and_complex(world: Any) -> None:
    last = torch.tensor([world.rank() == world.size() - 1, True, False])
    assert world.allreduce(last, op=world.Max).tolist() == [True, True, False]
    assert world.allreduce(last, op=world.Min).tolist() == [False, True, False]
    with pytest.raises(TypeError, match="bool"):
        world.allreduce(last)
    with pytest.raises(TypeError, match="order"):
        world.allreduce(torch.ones(1, dtype=torch.complex64), op=world.Max)


def test_not_contiguous(world: Any) -> None:
    base = torch.arange(24.0).view(4, 6)
    for tensor in (base.t(), base[:, ::2], base[1:3], torch.ones(1).expand(5).clone()[::2], base.flip(0)):
        own = tensor + world.rank()
        view = own.t() if own.dim() == 2 else own
        want = view * world.size() - world.rank() * world.size() + sum(range(world.size()))
        assert torch.allclose(world.allreduce(view, op=world.Sum), want)
        world.allreduce_(view, op=world.Sum)
        assert torch.allclose(view, want)


def test_broadcast(world: Any) -> None:
    for root in range(world.size()):
        for dtype in (*DTYPES, torch.bool):
            for shape in ((), (0,), (3, 4), (70_000,)):
                tensor = mine(world.rank(), shape, dtype)
                want = mine(root, shape, dtype)
                assert torch.equal(world.broadcast(tensor, root), want)
                assert torch.equal(tensor, mine(world.rank(), shape, dtype))
                assert world.broadcast_(tensor, root) is tensor and torch.equal(tensor, want)
    with pytest.raises(ValueError, match="root_rank=9"):
        world.broadcast(torch.ones(1), 9)
    assert world.broadcast(torch.ones(1), torch.tensor(0)).item() == 1  # a number that does not travel as it is


def test_a_large_broadcast_goes_in_segments(world: Any) -> None:
    tensor = torch.arange(1_000_003.0) * (world.rank() == 1)
    assert torch.equal(world.broadcast_(tensor, 1), torch.arange(1_000_003.0))


def test_allgather_of_different_lengths(world: Any) -> None:
    rank, size = world.rank(), world.size()
    for dtype in (*DTYPES, torch.bool):
        gathered = world.allgather(torch.full((rank, 2), 1).to(dtype) * torch.tensor(1).to(dtype))
        assert gathered.shape == (size * (size - 1) // 2, 2) and gathered.dtype == dtype
    gathered = world.allgather(torch.full((2 * rank + 1,), rank))
    assert gathered.tolist() == [r for r in range(size) for _ in range(2 * r + 1)]
    assert world.allgather(torch.tensor(rank)).tolist() == list(range(size))
    conjugate = torch.tensor([1 + 2j]).conj()
    assert world.allgather(conjugate).tolist() == [1 - 2j] * size
    assert world.allgather(conjugate.imag).tolist() == [-2.0] * size
    assert world.allgather(torch.empty(0, 3)).shape == (0, 3)
    assert world.allgather(torch.empty(2, 0)).shape == (2 * size, 0)


def test_names_in_any_order(world: Any) -> None:
    names = [f"n{i}" for i in range(40)]
    random.Random(world.rank()).shuffle(names)
    handles = {
        name: world.allreduce_async(torch.full((5,), float(name[1:])), name=name, op=world.Sum) for name in names
    }
    random.Random(7 * world.rank()).shuffle(names)
    for name in names:
        assert torch.equal(world.synchronize(handles[name]), torch.full((5,), float(name[1:]) * world.size()))


def test_a_name_twice_in_flight_raises_on_that_rank_alone(world: Any) -> None:
    if world.rank() == 0:
        handle = world.allreduce_async(torch.ones(2), name="twice")
        with pytest.raises(world.DuplicateNameError, match="'twice'"):
            world.allreduce_async(torch.ones(2), name="twice")
        world.barrier()
    else:
        world.barrier()  # rank 0 has seen it: only now may the first be completed
        handle = world.allreduce_async(torch.ones(2), name="twice")
    assert torch.equal(world.synchronize(handle), torch.ones(2))
    assert torch.equal(world.allreduce(torch.ones(2), name="twice"), torch.ones(2))


@pytest.mark.parametrize("what", ["shape", "dtype", "op", "root", "kind", "scale"])
@pytest.mark.parametrize("name", ["named", None])
def test_mismatches_raise_everywhere_and_leave_the_library_usable(world: Any, what: str, name: str | None) -> None:
    odd = world.rank() == 1
    with pytest.raises(world.MismatchError, match=f"the {what} is .* on rank.*; .* on rank 1") as caught:
        if what == "shape":
            world.allreduce(torch.ones(3 if odd else 2), name=name)
        elif what == "dtype":
            world.allreduce(torch.ones(2, dtype=torch.float64 if odd else torch.float32), name=name)
        elif what == "op":
            world.allreduce(torch.ones(2), op=world.Max if odd else world.Min, name=name)
        elif what == "root":
            world.broadcast(torch.ones(2), int(odd), name=name)
        elif what == "scale":
            world.allreduce(torch.ones(2), postscale_factor=2.0 if odd else 1.0, name=name)
        elif odd:
            world.broadcast(torch.ones(2), 0, name=name)
        else:
            world.allreduce(torch.ones(2), name=name)
    assert (name or "unnamed") in str(caught.value)
    assert world.allreduce(torch.ones(2), op=world.Sum).tolist() == [world.size()] * 2


def test_wrong_arguments(world: Any) -> None:
    with pytest.raises(TypeError, match="broadcast_object"):
        world.allreduce([1, 2])
    with pytest.raises(ValueError, match="to_dense"):
        world.allreduce(torch.ones(2, 2).to_sparse())
    with pytest.raises(ValueError, match="op='sum'"):
        world.allreduce(torch.ones(2), op="sum")


def test_poll(world: Any) -> None:
    handle = world.allreduce_async(torch.ones(1))
    until = time.monotonic() + 20
    while not world.poll(handle):
        assert time.monotonic() < until
    assert world.poll(handle) and world.synchronize(handle).item() == 1 and world.synchronize(handle).item() == 1


def test_the_barrier(world: Any) -> None:
    began = time.monotonic()
    world.barrier()
    if world.rank() == 1:
        time.sleep(0.3)
    world.barrier()
    assert world.rank() == 1 or time.monotonic() - began > 0.25


def test_progress_when_one_rank_sits_in_a_barrier_of_its_own(world: Any) -> None:
    """Rank 0 submits and blocks in MPI; the others wait for the result before they come to that barrier."""
    from mpi4py import MPI

    for numel in (1, 1000, 300_000):
        handle = world.allreduce_async(torch.ones(numel), op=world.Sum)
        if world.rank() != 0:
            world.synchronize(handle)
        MPI.COMM_WORLD.Barrier()
        assert world.synchronize(handle)[0] == world.size()


def test_the_users_own_traffic_never_meets_ours(world: Any) -> None:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    request = comm.irecv(source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG)
    handles = [world.allreduce_async(torch.full((3,), float(i)), op=world.Sum) for i in range(10)]
    comm.send("mine", right, tag=32767)
    assert request.wait() == "mine"
    assert [world.synchronize(handle)[0].item() for handle in handles] == [i * world.size() for i in range(10)]
    assert comm.allreduce(1) == comm.size and left >= 0


def test_a_second_thread(world: Any) -> None:
    """Two threads of a rank wait for different operations."""
    import threading

    results: dict[str, float] = {}

    def reduce(name: str) -> None:
        for number in range(20):
            results[name] = world.allreduce(torch.ones(100), name=f"{name} {number}", op=world.Sum)[0].item()

    threads = [threading.Thread(target=reduce, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == {"one": world.size(), "two": world.size()}


def test_an_idle_engine_uses_no_cpu(world: Any) -> None:
    world.barrier()
    time.sleep(1.0)  # the liveness thread goes to sleep
    began, wall = time.process_time(), time.monotonic()
    time.sleep(0.5)
    assert (time.process_time() - began) / (time.monotonic() - wall) < 0.01
    world.barrier()


@pytest.mark.ranks(2, timeout_s=120)
def test_in_a_compiled_function(world: Any) -> None:
    """The exchange breaks the graph, and nothing of the engine is compiled."""

    def both(x: torch.Tensor) -> torch.Tensor:
        total = world.allreduce(x * 2, op=world.Sum)
        handle = world.allreduce_async_(torch.ones(3), op=world.Sum)
        return total + world.synchronize(handle)[0] + world.broadcast(x, 0)

    x = torch.full((4,), float(world.rank()))
    expected = both(x)
    compiled = torch.compile(both, backend="eager")
    for _ in range(3):
        assert torch.equal(compiled(x), expected)
    big = torch.arange(100_000.0)
    assert torch.equal(torch.compile(world.allreduce, backend="eager")(big), big)


@pytest.mark.ranks(2, 3, 4)
def test_small_sums_in_one_step(world: Any) -> None:
    """Sizes around what fits into an area of shared memory; more of them than there are areas."""
    from mpiddp.transport.areas import AREA_NBYTES

    most = AREA_NBYTES // 4
    total = world.size() * (world.size() + 1) // 2
    for numel in (1, 3, most - 1, most, most + 1):
        for dtype in (torch.float32, torch.int32):
            handles = [
                world.allreduce_async_(torch.full((numel,), k + 1, dtype=dtype) * (world.rank() + 1)) for k in range(3)
            ]
            handles += [
                world.allreduce_async_(torch.full((numel,), float(world.rank() + 1)), op=world.Sum) for _ in range(40)
            ]
            for k, handle in enumerate(handles[:3]):
                expected = torch.full((numel,), (k + 1) * total, dtype=dtype)
                average = expected / world.size() if dtype.is_floating_point else expected // world.size()
                assert torch.equal(world.synchronize(handle), average)
            assert all(torch.equal(world.synchronize(h), torch.full((numel,), float(total))) for h in handles[3:])


@pytest.mark.ranks(2, 3, 4)
def test_those_who_wait_meet(world: Any) -> None:
    """Sizes around what fits into a meeting's area, in memory of one's own and in shared; waited for by all, and not by
    all."""
    from mpiddp.transport.areas import MEETING_AREA_NBYTES

    most = MEETING_AREA_NBYTES // 4
    total = float(world.size() * (world.size() + 1) // 2)
    for numel in (1, 5, most // 2, most, most + 1, 2 * most + 5):
        for dtype in (torch.float32, torch.bfloat16):
            own = torch.full((numel,), world.rank() + 1, dtype=dtype)
            shared = world.empty(numel, dtype=dtype).fill_(world.rank() + 1)
            late = own.clone()
            for tensor in (own, shared):
                assert torch.equal(world.allreduce_(tensor, op=world.Sum), torch.full((numel,), total, dtype=dtype))
            if world.rank() == world.size() - 1:
                world.synchronize(world.allreduce_async_(late, op=world.Sum))
            else:
                world.allreduce_(late, op=world.Sum)
            assert torch.equal(late, own)
