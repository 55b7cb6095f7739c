"""What is kept of an operation with a name once it is done."""

from __future__ import annotations

import gc
from typing import Any
from weakref import ref

import pytest
import torch

from mpiddp import runtime

pytestmark = pytest.mark.ranks(2, 3)


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
