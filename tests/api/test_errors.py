"""What differs between ranks raises on all of them, says what and where, and leaves the library usable."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.ranks(2, 3, 4)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def on_device(kind: str) -> torch.Tensor:
    return torch.ones(12, device=kind)


def asynchronous(world: Any, odd: bool, name: str | None) -> Any:
    tensor = ones(world.size())
    handle = world.broadcast_async(tensor, 0, name=name) if odd else world.alltoall_async(tensor, name=name)
    return world.synchronize(handle)


def grouped(world: Any, odd: bool, name: str | None) -> Any:
    if odd:
        return world.grouped_allreduce([ones(2), ones(2)], name=name)
    return world.allreduce(ones(2), name=name and f"{name}.0")


def group_kinds(world: Any, odd: bool, name: str | None) -> Any:
    call = world.grouped_allgather if odd else world.grouped_allreduce_
    return call([ones(2), ones(2)], name=name)


F32, F64, I64, U8 = torch.float32, torch.float64, torch.int64, torch.uint8

#: What differs, the two values, and a call that differs on the rank that is odd.
MISTAKES: dict[str, tuple[str, str, str, Callable[[Any, bool, str | None], Any]]] = {
    "allreduce shape": ("shape", "(2,)", "(3,)", lambda w, odd, n: w.allreduce(ones(2 + odd), name=n)),
    "allreduce dims": ("shape", "(4,)", "(2, 2)", lambda w, odd, n: w.allreduce(ones(*[2, 2] if odd else [4]), name=n)),
    "large": ("shape", "(70000,)", "(70001,)", lambda w, odd, n: w.allreduce_(ones(70_000 + odd), name=n)),
    "dtype": ("dtype", "float32", "int64", lambda w, odd, n: w.allreduce(ones(2, dtype=I64 if odd else F32), name=n)),
    "op": ("op", "min", "product", lambda w, odd, n: w.allreduce(ones(2), op=w.Product if odd else w.Min, name=n)),
    "average": ("scale", "1.0", "", lambda w, odd, n: w.allreduce(ones(2), op=w.Average if odd else w.Sum, name=n)),
    "prescale": (
        "prescale", "1.0", "0.5", lambda w, odd, n: w.allreduce(ones(2), prescale_factor=1 - odd / 2, name=n)
    ),
    "allgather columns": ("shape", "(2,)", "(3,)", lambda w, odd, n: w.allgather(ones(1, 2 + odd), name=n)),
    "allgather dims": ("shape", "()", "(2,)", lambda w, odd, n: w.allgather(ones(*[2, 2] if odd else [2]), name=n)),
    "allgather dtype": (
        "dtype", "float32", "float64", lambda w, odd, n: w.allgather(ones(2, dtype=F64 if odd else F32), name=n)
    ),
    "broadcast shape": ("shape", "(2,)", "(3,)", lambda w, odd, n: w.broadcast(ones(2 + odd), 0, name=n)),
    "broadcast root": ("root", "0", "1", lambda w, odd, n: w.broadcast_(ones(2), int(odd), name=n)),
    "broadcast dtype": (
        "dtype", "float32", "bool", lambda w, odd, n: w.broadcast(ones(2, dtype=torch.bool if odd else F32), 0, name=n)
    ),
    "alltoall columns": ("shape", "(2,)", "(3,)", lambda w, odd, n: w.alltoall(ones(w.size(), 2 + odd), name=n)),
    "alltoall dtype": (
        "dtype", "float32", "uint8", lambda w, odd, n: w.alltoall(ones(w.size(), dtype=U8 if odd else F32), name=n)
    ),
    "reducescatter shape": ("shape", "(8,)", "(9,)", lambda w, odd, n: w.reducescatter(ones(8 + odd), name=n)),
    "reducescatter op": (
        "op", "min", "max", lambda w, odd, n: w.reducescatter(ones(8), op=w.Max if odd else w.Min, name=n)
    ),
    "kind": (
        "kind", "allgather", "allreduce", lambda w, odd, n: (w.allreduce if odd else w.allgather)(ones(2), name=n)
    ),
    "device": ("device", "cpu", "meta", lambda w, odd, n: w.allreduce(on_device("meta" if odd else "cpu"), name=n)),
    "device of rows": (
        "device", "cpu", "meta", lambda w, odd, n: w.alltoall(on_device("meta" if odd else "cpu"), name=n)
    ),
    "asynchronous kind": ("kind", "alltoall", "broadcast", asynchronous),
    "single and group": ("group", "none", "2 tensors", grouped),
    "groups": (
        "group", "3 tensors", "2 tensors", lambda w, odd, n: w.grouped_allreduce([ones(2)] * (3 - odd), name=n)
    ),
    "group kinds": ("kind", "allreduce", "allgather", group_kinds),
}  # fmt: skip


@pytest.mark.parametrize("odd_rank", [0, -1])
@pytest.mark.parametrize("name", ["a name", None])
@pytest.mark.parametrize("what", MISTAKES)
def test_mismatches(world: Any, what: str, name: str | None, odd_rank: int) -> None:
    field, usual, unusual, call = MISTAKES[what]
    odd = odd_rank % world.size()
    with pytest.raises(world.MismatchError) as caught:
        call(world, world.rank() == odd, name)
    text = str(caught.value)
    others = [rank for rank in range(world.size()) if rank != odd]
    holders = f"rank{'s' * (len(others) > 1)} {', '.join(map(str, others))}"
    assert re.search(rf"the {field} is ", text), text
    assert f"{usual} on {holders}" in text and re.search(rf"{re.escape(unusual)}\S* on rank {odd}\b", text), text
    assert (name or "unnamed") in text
    assert isinstance(caught.value, world.HorovodInternalError) and isinstance(caught.value, RuntimeError)
    assert world.allreduce(torch.ones(2), name=name, op=world.Sum)[0] == world.size()
    assert world.allgather(torch.ones(1)).numel() == world.size()


def test_a_barrier_and_something_else(world: Any) -> None:
    with pytest.raises(world.MismatchError, match=r"kind is .*barrier on rank"):
        if world.rank() == 0:
            world.barrier()
        else:
            world.allreduce(torch.ones(1))
    world.barrier()


def test_a_mistake_among_others_in_flight(world: Any) -> None:
    """Neighbours that would be fused with it are right."""
    handles = [world.allreduce_async(torch.ones(4), name=f"ok {n}", op=world.Sum) for n in range(5)]
    bad = world.allreduce_async_(torch.ones(4 + (world.rank() == 1)), name="bad", op=world.Sum)
    handles += [world.allreduce_async(torch.ones(4), name=f"fine {n}", op=world.Sum) for n in range(5)]
    assert all(world.synchronize(handle)[0] == world.size() for handle in handles)
    for _ in range(2):
        with pytest.raises(world.MismatchError, match="'bad'"):
            world.synchronize(bad)
    assert world.poll(bad) is True


def test_the_tensor_of_an_operation_that_failed_is_left_alone(world: Any) -> None:
    for numel in (2, 40_000):
        tensor = torch.ones(numel + (world.rank() == 1))
        with pytest.raises(world.MismatchError):
            world.allreduce_(tensor, op=world.Sum)
        assert torch.equal(tensor, torch.ones_like(tensor))


@pytest.mark.parametrize("kind", ["allreduce", "allgather", "broadcast", "alltoall", "reducescatter", "grouped"])
def test_a_name_in_flight(world: Any, kind: str) -> None:
    """ValueError at once, on that rank alone, with nothing sent and the tensor as it was."""
    size = world.size()

    def submit() -> Any:
        tensor = torch.ones(size)
        if kind == "broadcast":
            return world.broadcast_async(tensor, 0, name="name")
        if kind == "grouped":
            return world.grouped_allreduce_async([tensor, tensor], name="name")
        return getattr(world, f"{kind}_async")(tensor, name="name")

    if world.rank() == 1:
        handle = submit()
        for _ in range(3):
            with pytest.raises(ValueError, match=r"'name(\.0)?' is in flight on rank 1"):
                submit()
        other = torch.ones(2)
        with pytest.raises(ValueError, match=r"in flight"):
            name = "name.1" if kind == "grouped" else "name"
            world.allreduce_(other, name=name, prescale_factor=5.0)
        assert torch.equal(other, torch.ones(2))
        world.barrier()
    else:
        world.barrier()  # rank 1 has seen it: only now may the first be completed
        handle = submit()
    world.synchronize(handle)
    world.synchronize(submit())


def test_names_again_and_again(world: Any) -> None:
    """One name for different things, one after the other."""
    size = world.size()
    for turn in range(30):
        assert world.allreduce(torch.ones(turn % 3 + 1), name="n", op=world.Sum)[0] == size
        assert world.allgather(torch.ones(turn % 4, 2), name="n").shape[0] == size * (turn % 4)
        assert world.broadcast(torch.full((2,), float(world.rank())), turn % size, name="n")[0] == turn % size
    for turn in range(3):
        handles = [world.allreduce_async(torch.ones(1), name=f"{turn} {n}", op=world.Sum) for n in range(500)]
        assert all(world.synchronize(handle).item() == size for handle in handles)


def test_what_is_no_dense_tensor(world: Any) -> None:
    calls = [
        lambda bad: world.allreduce(bad),
        lambda bad: world.allreduce_(bad),
        lambda bad: world.allreduce_async(bad),
        lambda bad: world.allgather(bad),
        lambda bad: world.broadcast(bad, 0),
        lambda bad: world.alltoall(bad),
        lambda bad: world.reducescatter(bad),
        lambda bad: world.grouped_allreduce([bad]),
        lambda bad: world.grouped_allgather([bad]),
    ]
    for call in calls:
        for bad in (3.0, [1, 2], None):
            with pytest.raises(TypeError, match=r"torch\.Tensor"):
                call(bad)
        with pytest.raises(ValueError, match="dense"):
            call(torch.ones(2, 2).to_sparse())
        with pytest.raises(TypeError, match="complex32"):
            call(torch.ones(world.size(), dtype=torch.complex32))
    assert world.allreduce(torch.ones(1), op=world.Sum).item() == world.size()


def test_tensors_without_values(world: Any) -> None:
    """What fails in the exchange itself fails alike on all ranks, and only there."""
    fine = world.allreduce_async(torch.ones(2), name="fine", op=world.Sum)
    for call in (world.allreduce, world.allgather, world.alltoall, world.reducescatter):
        with pytest.raises((RuntimeError, ValueError), match="meta"):
            call(torch.ones(12, device="meta"))
    with pytest.raises((RuntimeError, ValueError), match="meta"):
        world.broadcast(torch.ones(12, device="meta"), 0)
    assert world.synchronize(fine)[0] == world.size()


def test_many_mistakes_in_a_row(world: Any) -> None:
    for number in range(40):
        with pytest.raises(world.MismatchError):
            world.allreduce(torch.ones(2 + (world.rank() == number % world.size())), name="again")
    assert world.allreduce(torch.ones(2), name="again", op=world.Sum)[0] == world.size()


def test_devices_that_cannot_be_exchanged(world: Any) -> None:
    """Where all ranks agree on such a device, all are told."""
    with pytest.raises(world.CollectiveError, match=r"lies on 'meta'; .*CPU or on CUDA"):
        world.allreduce(torch.ones(3, device="meta"), name="nowhere")
    assert world.allreduce(torch.ones(1), op=world.Sum).item() == world.size()
