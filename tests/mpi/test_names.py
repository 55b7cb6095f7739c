"""Names and factors of any class, and what is kept of an operation with a name once it is done."""

from __future__ import annotations

import enum
import gc
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch

from mpiddp import runtime

pytestmark = pytest.mark.ranks(2, 3)


class Word(str):
    """A class of strings of the user's own."""

    __slots__ = ()


class Letter(str, enum.Enum):
    """Whose members are shown otherwise than they are."""

    A = "a"


def kept() -> list[Any]:
    """The operations with a name that are not gone."""
    return [request for found in runtime.current().channel.names.values() if (request := found()) is not None]


@pytest.mark.parametrize("numel", [3, 300_000])
def test_nothing_is_kept_of_what_is_done(world: Any, numel: int) -> None:
    size = world.size()
    rows = size * numel
    calls = {
        "allreduce": lambda name: world.allreduce(torch.ones(numel), name=name),
        "allreduce_async": lambda name: world.synchronize(world.allreduce_async(torch.ones(numel), name=name)),
        "allgather": lambda name: world.allgather(torch.ones(numel), name=name),
        "broadcast": lambda name: world.broadcast(torch.ones(numel), 0, name=name),
        "alltoall": lambda name: world.alltoall(torch.ones(rows), name=name),
        "reducescatter": lambda name: world.reducescatter(torch.ones(rows), name=name),
        "grouped": lambda name: world.grouped_allreduce([torch.ones(numel)] * 2, name=name)[1],
        "strided": lambda name: world.allreduce_(torch.ones(numel, 2)[:, 0], name=name),
    }
    gc.collect()
    gc.disable()
    try:
        for what, call in calls.items():
            result = call(f"kept {what}")
            kept_result = ref(result)
            del result
            world.barrier()  # another push
            assert kept_result() is None and kept() == [], what
    finally:
        gc.enable()


def test_windows_of_parameters_are_not_kept(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpiddp.functions.flat.WINDOW_NBYTES", 1 << 12)
    world.broadcast_parameters([(f"p{n}", torch.ones(600)[::2]) for n in range(12)])
    assert kept() == []


def test_a_name_is_free_after_an_error(world: Any) -> None:
    for _ in range(2):
        handle = world.allreduce_async(torch.ones(2 + (world.rank() == 1)), name="again")
        with pytest.raises(world.MismatchError, match="'again'"):
            world.synchronize(handle)
        assert world.allreduce(torch.ones(2), name="again", op=world.Sum)[0] == world.size()
    del handle
    gc.collect()  # an error and its traceback hold each other
    assert kept() == []


def test_names_of_many_operations_in_flight(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where those that are done are forgotten, those in flight are not."""
    monkeypatch.setattr("mpiddp.ops.submit._REMEMBERED", 4)
    if world.rank() == 1:
        handles = [world.allreduce_async(torch.ones(1), name=f"many {n}") for n in range(10)]
        for number in range(10):
            with pytest.raises(world.DuplicateNameError):
                world.allreduce_async(torch.ones(1), name=f"many {number}")
        world.barrier()
    else:
        world.barrier()
        handles = [world.allreduce_async(torch.ones(1), name=f"many {n}") for n in range(10)]
    assert all(world.synchronize(handle).item() == 1 for handle in handles)
    world.allreduce(torch.ones(1), name="last")
    assert len(runtime.current().channel.names) <= 4


def test_names_of_other_classes_meet_plain_ones(world: Any) -> None:
    def same(name: str) -> str:
        return name if world.rank() == 1 else str.__str__(name)

    size = world.size()
    for name in (np.str_("word"), Word("own"), Letter.A):
        assert world.allreduce(torch.ones(2), name=same(name), op=world.Sum)[0] == size
        assert world.allgather(torch.ones(2), name=same(name)).numel() == 2 * size
        assert world.grouped_allreduce([torch.ones(2)] * 2, name=same(name), op=world.Sum)[1][0] == size
        assert world.broadcast_object(world.rank(), name=same(name)) == 0
        assert world.allgather_object(world.rank(), name=same(name)) == list(range(size))
        collect = world.sparse_allreduce_async(torch.ones(2).to_sparse(), same(name), world.Sum)
        assert collect().to_dense().tolist() == [size] * 2
        if world.rank() == 1:
            handle = world.allreduce_async(torch.ones(1), name=name)
            with pytest.raises(ValueError, match=f"^{str.__repr__(name)} is in flight"):
                world.allreduce_async(torch.ones(1), name=str.__str__(name))
            world.barrier()
        else:
            world.barrier()
            handle = world.allreduce_async(torch.ones(1), name=str.__str__(name))
        world.synchronize(handle)


@pytest.mark.parametrize("name", [7, 0, (1, 2), b"bytes", torch.ones(1)], ids=str)
def test_what_is_no_name(world: Any, name: Any) -> None:
    """On the rank alone that gives it, with nothing sent, and no number used up."""
    rows = torch.ones(world.size())
    calls = [
        lambda: world.allreduce(rows, name=name),
        lambda: world.allreduce_async_(rows, name=name, prescale_factor=2.0),
        lambda: world.grouped_allreduce([rows], name=name),
        lambda: world.grouped_allgather([rows], name=name),
        lambda: world.allgather(rows, name=name),
        lambda: world.broadcast(rows, 0, name=name),
        lambda: world.alltoall(rows, name=name),
        lambda: world.reducescatter(rows, name=name),
        lambda: world.sparse_allreduce_async(rows.to_sparse(), name),
        lambda: world.broadcast_object(1, name=name),
        lambda: world.allgather_object(1, name=name),
    ]
    if world.rank() == 1:
        for call in calls:
            with pytest.raises(TypeError, match=rf"a name is a str, not a {type(name).__name__}"):
                call()
        assert torch.equal(rows, torch.ones(world.size()))
    assert world.allreduce(torch.ones(1), op=world.Sum).item() == world.size()


HALVES = [0.5, np.float64(0.5), np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5]), np.array(0.5)]


@pytest.mark.parametrize("name", ["named", None])
@pytest.mark.parametrize("half", HALVES, ids=lambda half: type(half).__name__)
def test_factors_of_any_class(world: Any, half: Any, name: str | None) -> None:
    """Each means what the plain number means, also where another rank gives that."""
    given = half if world.rank() == 1 else 0.5
    size = world.size()
    ones = torch.ones(size)
    for factors in ({"prescale_factor": given}, {"postscale_factor": given}):
        want = torch.full((size,), size * 0.5)
        arguments = {"name": name, "op": world.Sum, **factors}
        assert torch.equal(world.allreduce(ones, **arguments), want)
        assert torch.equal(world.allreduce_(ones.clone(), **arguments), want)
        assert torch.equal(world.synchronize(world.allreduce_async(ones, **arguments)), want)
        assert torch.equal(world.grouped_allreduce([ones, ones], **arguments)[1], want)
        assert torch.equal(world.reducescatter(ones, **arguments), want[:1])
        assert torch.equal(world.grouped_reducescatter([ones], **arguments)[0], want[:1])


def test_integers_as_factors(world: Any) -> None:
    """They travel as the same floats: those who wait would never recognize each other."""
    given = [2, 2.0, np.int64(2)][world.rank()]
    for _ in range(3):
        tensor = torch.ones(3)
        world.allreduce_(tensor, op=world.Sum, prescale_factor=given)
        assert tensor[0] == 2 * world.size()
        world.allreduce_(tensor, postscale_factor=given)
        assert tensor[0] == 4 * world.size()


def test_what_is_no_factor(world: Any) -> None:
    """On one rank alone, with no number used up."""
    if world.rank() == 1:
        for bad in ("0.5", None, 1j, torch.ones(2)):
            for call in (world.allreduce, world.reducescatter, lambda t, **o: world.grouped_allreduce([t], **o)):
                for which in ("prescale_factor", "postscale_factor"):
                    with pytest.raises((TypeError, ValueError, RuntimeError)):
                        call(torch.ones(3), **{which: bad})
    assert world.allreduce(torch.ones(1), op=world.Sum).item() == world.size()


@pytest.mark.parametrize("part", ["length", "lengths", "bytes", "indices", "values"])
def test_a_part_of_an_operation_in_flight(world: Any, part: str) -> None:
    """What takes several operations raises before the first of them."""
    size = world.size()
    calls = {
        "broadcast": lambda: world.broadcast_object(7, name="x") == 7,
        "gather": lambda: world.allgather_object(7, name="x") == [7] * size,
        "sparse": lambda: world.sparse_allreduce_async(torch.ones(1).to_sparse(), "x")().to_dense().item() == 1,
    }
    uses = {"length": ["broadcast"], "lengths": ["gather"], "bytes": ["broadcast", "gather"]}.get(part, ["sparse"])
    if world.rank() == 1:
        handle = world.allreduce_async(torch.ones(1), name=f"x.{part}")
        for use in uses:
            with pytest.raises(world.DuplicateNameError, match=rf"'x\.{part}'"):
                calls[use]()
        world.barrier()
    else:
        world.barrier()
        handle = world.allreduce_async(torch.ones(1), name=f"x.{part}")
    assert world.synchronize(handle).item() == 1
    assert all(calls[use]() for use in uses)


def test_tensors_of_a_generator(world: Any) -> None:
    size = world.size()

    def tensors() -> Any:
        return (torch.full((2,), float(n)) for n in range(1, 3))

    for call in (world.grouped_allreduce, world.grouped_allreduce_):
        assert [each[0] for each in call(tensors(), op=world.Sum)] == [size, 2 * size]
    assert [each.numel() for each in world.grouped_allgather(tensors())] == [2 * size] * 2


def test_what_is_no_process_set(world: Any) -> None:
    for bad in (None, 0, [0]):
        with pytest.raises(TypeError, match=rf"process_set is a ProcessSet, not a {type(bad).__name__}"):
            world.allreduce(torch.ones(1), process_set=bad)


def test_sparse_bool(world: Any) -> None:
    sparse = torch.tensor([world.rank() == 1, False]).to_sparse()
    assert world.sparse_allreduce_async(sparse, None, world.Sum)().to_dense().tolist() == [True, False]
    with pytest.raises(TypeError, match="no average"):
        world.sparse_allreduce_async(sparse, None)
