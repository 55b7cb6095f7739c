"""Several engines in one thread, over a simulated network: negotiation, fusion, errors, and how little is sent."""

from __future__ import annotations

import random

import pytest
import torch

from mpiddp.collectives.base import ReduceOp
from mpiddp.engine import Handle, Kind, Request
from mpiddp.engine.bucket import fuse
from mpiddp.engine.coordinator import Coordinator
from mpiddp.engine.member import Member
from mpiddp.engine.request import Signature
from mpiddp.engine.wire import NEWS, TABLE_ENTRIES
from mpiddp.errors import ArgumentError, MismatchError, MpiddpError
from mpiddp.transport.base import Steps
from tests.simulated_world import World
from tests.simulation import Deadlock


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_orders_may_differ_between_ranks(size: int) -> None:
    for seed in range(20):
        world = World(size, seed, fusion_nbytes=random.Random(seed).choice([0, 16, 1 << 20]))
        names = [f"tensor {i}" for i in range(12)]
        handles: dict[tuple[int, str], Handle] = {}
        for rank in range(size):
            for name in random.Random(100 * seed + rank).sample(names, len(names)):
                handles[rank, name] = world.allreduce(rank, name, [float(names.index(name)), rank])
                if world.network.random.random() < 0.5:
                    world.engines[rank].push()
        world.run(list(handles.values()))
        for (_, name), handle in handles.items():
            assert handle.result.tolist() == [size * names.index(name), size * (size - 1) / 2]
        assert world.network.idle() and not any(engine.pending() for engine in world.engines)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_what_differs_is_an_error_on_every_rank_and_nothing_else_suffers(size: int) -> None:
    world = World(size)
    bad = [world.allreduce(rank, "bad", [1.0] * (3 if rank == size - 1 else 2)) for rank in range(size)]
    good = [world.allreduce(rank, "good", [1.0]) for rank in range(size)]
    world.run(bad + good)
    for handle in bad:
        assert isinstance(handle.error, MismatchError)
        assert "'bad'" in str(handle.error) and "(2,) on rank" in str(handle.error)
        assert f"(3,) on rank {size - 1}" in str(handle.error)
    assert all(handle.result.tolist() == [size] for handle in good)


def test_an_error_inside_a_fused_group_is_reported_alone() -> None:
    world = World(2)
    handles = {
        (rank, name): world.allreduce(rank, name, [1.0], ReduceOp.MAX if (rank, name) == (1, "b") else ReduceOp.SUM)
        for rank in range(2)
        for name in "abc"
    }
    world.run(list(handles.values()))
    assert [isinstance(handles[r, "b"].error, MismatchError) for r in range(2)] == [True, True]
    assert "sum on rank 0; max on rank 1" in str(handles[0, "b"].error)
    assert [handles[r, n].result.item() for r in range(2) for n in "ac"] == [2, 2, 2, 2]


def test_messages_per_request_are_bounded() -> None:
    """A member sends one message at most for each push with something new; the coordinator one to each member."""
    for size in (2, 4):
        world = World(size)
        for number in range(30):
            world.run([world.allreduce(rank, number, [1.0]) for rank in range(size)])
        assert [port.sent for port in world.ports] == [30 * (size - 1)] + [30] * (size - 1)


def test_nothing_is_sent_while_nothing_changes() -> None:
    world = World(3)
    handles = [world.allreduce(rank, "x", [1.0]) for rank in (0, 1)]
    with pytest.raises(Deadlock, match=r"\['x'\] not run"):
        world.run(handles)
    for _ in range(1000):
        for engine in world.engines:
            engine.push()
    assert not any(handle.done for handle in handles)
    assert sum(port.sent for port in world.ports) == 1
    assert world.network.sent_messages == [0, 0, 0]


def test_the_table_is_bounded() -> None:
    member, coordinator = Member(), Coordinator([0], 0)
    signature = Signature(0, "float32", (1,))
    for number in range(2 * TABLE_ENTRIES + 5):
        member.submit(Request(f"name {number}", signature, torch.zeros(1)))
        coordinator.receive(0, member.message())
        for _, run_list in coordinator.messages():
            (run,), _ = member.read(run_list)
            assert run.requests[0].key == f"name {number}"
    assert len(coordinator._tables[0]) <= TABLE_ENTRIES and not coordinator.announced and not member.waiting


def test_fusion_keeps_the_order_and_the_limit() -> None:
    one = Signature(int(Kind.ALLREDUCE), "float32", (1,))
    other = one._replace(dtype="int32")
    gather = one._replace(kind=int(Kind.ALLGATHER))
    assert fuse([one, one, other, one, one, one], 8) == [[0, 1], [2], [3, 4], [5]]
    assert fuse([gather, gather], 8) == [[0], [1]]
    assert fuse([one, one], 0) == [[0], [1]]
    assert fuse([], 8) == []


def test_waiting_from_inside_a_push_raises() -> None:
    world = World(1)
    errors: list[BaseException] = []

    def deliver(flat: torch.Tensor) -> None:
        try:
            world.engines[0].wait(Handle("another"))
        except MpiddpError as error:
            errors.append(error)

    signature = Signature(int(Kind.ALLREDUCE), "float32", (1,))
    handle = world.engines[0].submit(world.channels[0], Request("x", signature, torch.ones(1), deliver))
    world.run([handle])
    assert "inside a push" in str(errors[0])


def test_what_an_exchange_raises_belongs_to_who_waits_for_it() -> None:
    world = World(1)

    def deliver(flat: torch.Tensor) -> None:
        raise ZeroDivisionError("on purpose")

    signature = Signature(int(Kind.ALLREDUCE), "float32", (1,))
    handle = world.engines[0].submit(world.channels[0], Request("x", signature, torch.ones(1), deliver))
    world.run([handle])
    with pytest.raises(ZeroDivisionError):
        world.engines[0].wait(handle)


def test_a_stopped_engine_says_so() -> None:
    world = World(2)
    handle = world.allreduce(0, "x", [1.0])
    world.engines[0].stop(MpiddpError("over"))
    with pytest.raises(MpiddpError, match="over"):
        world.engines[0].wait(handle)
    with pytest.raises(MpiddpError, match="over"):
        world.allreduce(0, "y", [1.0])


def test_a_channel_that_is_removed_fails_what_is_in_flight_and_what_comes() -> None:
    world = World(2)
    engine, channel = world.engines[0], world.channels[0]
    lane = channel.lane()

    def never(*_: object) -> Steps:
        while True:
            yield None

    named, begun = world.allreduce(0, "x", [1.0]), lane.launch("begun", never)
    engine.push()
    launched = lane.launch("launched", never)
    engine.remove(channel, "the set is gone")
    for handle in (named, begun, launched):
        with pytest.raises(ArgumentError, match="the set is gone"):
            engine.wait(handle)
    for _ in range(2):
        with pytest.raises(ArgumentError, match="the set is gone"):
            lane.launch("later", never)
    with pytest.raises(ArgumentError, match="the set is gone"):
        channel.tell_coordinator(NEWS, "topic")
    assert not engine.pending() and not channel.launches


@pytest.mark.parametrize(
    "mode",
    [
        torch.inference_mode,
        lambda: torch.autocast("cpu"),
        lambda: torch.device("meta"),
    ],
    ids=["inference_mode", "autocast", "default device"],
)
def test_a_push_is_not_touched_by_the_modes_of_who_pushes(mode) -> None:  # type: ignore[no-untyped-def]
    world = World(2)
    handles = [world.allreduce(rank, name, [1.0, 2.0]) for rank in range(2) for name in "ab"]
    with mode():
        world.run(handles)
    for handle in handles:
        assert handle.result.device.type == "cpu" and not handle.result.is_inference()
        assert handle.result.tolist() == [2.0, 4.0]
