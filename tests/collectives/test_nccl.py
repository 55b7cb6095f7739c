"""Collectives by NCCL within a node, over a fake of cupy's NCCL on a device that notices what nothing orders."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch

from mpiddp.collectives import ReduceOp, chunk_bounds, nccl, select
from mpiddp.dtypes import scale_
from mpiddp.engine import device as engine_device
from mpiddp.engine.device import Start, crossing
from mpiddp.engine.request import Handle
from mpiddp.engine.running import Running
from mpiddp.errors import CollectiveError
from mpiddp.memory.streams import Device
from mpiddp.transport.base import Levels
from mpiddp.transport.device import NCCL, STAGED, way_between
from mpiddp.transport.nccl import Nccl, NcclError, problem, takes
from tests import fake_nccl
from tests.collectives.test_cuda_ipc import FakeMemory
from tests.fake_device import FakeLink, FakeNetwork, Tracker
from tests.simulation import run


class AtOnce:
    """A start that does not block, in place of a thread."""

    def __init__(self, start: Any, ways: Any, device: torch.device) -> None:
        self.group, self.why = None, ""
        try:
            self.group = start()
        except NcclError as error:
            self.why = str(error)

    def is_alive(self) -> bool:
        return False


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_device, "WHOLE_NBYTES", 0)
    monkeypatch.setattr(nccl, "_Starting", AtOnce)


class World:
    """Ranks on ``nodes`` nodes, each with a GPU; what ``start`` makes of their tensors."""

    def __init__(self, tracker: Tracker, size: int, nodes: int = 1, seed: int = 0) -> None:
        self.network = FakeNetwork(tracker, size * nodes, seed)
        self.links = self.network.fake_links(lambda *_: STAGED)
        self.nodes = [fake_nccl.Node() for _ in range(nodes)]
        self.libraries = [fake_nccl.Library(self.nodes[link.rank // size], link.driver) for link in self.links]
        shared: list[dict[int, torch.Tensor]] = [{} for _ in range(nodes)]
        self.within = []
        for link, library in zip(self.links, self.libraries, strict=True):
            place, within = link.rank // size, link
            if nodes > 1:
                within = link.among(range(place * size, (place + 1) * size))  # type: ignore[assignment]
                link.levels = Levels(within, link.among([link.rank % size + size * n for n in range(nodes)]))  # type: ignore[arg-type]
            within.ways.can_map, within.ways.memory = True, FakeMemory(link.driver, shared[place])
            within.ways.wants_nccl = True
            within.ways.nccl_library = lambda library=library: library  # type: ignore[misc]
            self.within.append(within)

    def play(self, numel: int, *starts: Start, dtype: torch.dtype = torch.float32) -> list[list[torch.Tensor]]:
        """For each of ``starts``, which run at the same time: what each rank's user sees then. The ``i``th has ``i``
        elements more."""
        begun, steps = [], []
        for number, start in enumerate(starts):
            for link in self.links:
                flat = link.driver.tensor(values(link.rank, numel + number, dtype))
                begun.append((link, flat, link.ways.devices.depart(flat)))
                steps.append(crossing(*begun[-1], start))  # type: ignore[arg-type]
        run(self.network, steps)
        assert self.network.idle(), "messages were left behind"
        for _, _, passage in begun:
            passage.land()
        seen = [link.driver.read(flat) for link, flat, _ in begun]
        return [seen[at : at + len(self.links)] for at in range(0, len(seen), len(self.links))]


def values(rank: int, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.arange(numel) * (rank + 1) % 7 + rank).to(dtype)


def total(size: int, numel: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return scale_(sum((values(r, numel, dtype) for r in range(size)), torch.zeros(numel, dtype=dtype)), scale)


def allreduce(scale: float, tag: int = 5, op: ReduceOp = ReduceOp.SUM, is_ordered: bool = False) -> Start:
    return lambda link, flat: select.allreduce(link, flat, op, tag, scale, 64, is_ordered)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_allreduce(size: int) -> None:
    for numel, dtype in ((0, torch.float32), (1, torch.int64), (30, torch.float32), (101, torch.bfloat16)):
        for seed in range(3):
            with Tracker() as tracker:
                world = World(tracker, size, seed=seed)
                (results,) = world.play(numel, allreduce(0.5), dtype=dtype)
            assert all(torch.equal(result, total(size, numel, dtype, 0.5)) for result in results)
            assert world.nodes[0].ran == ["allReduce"] * (numel > 0)
            assert not numel or {way_between(link, 1, True) for link in world.links} == {NCCL}  # type: ignore[arg-type]


@pytest.mark.parametrize("numel", [99, 100])
def test_other_collectives(numel: int) -> None:
    """In chunks that are equal, which NCCL has calls for, and that are not."""
    size, bounds = 3, chunk_bounds(numel, 3)
    with Tracker() as tracker:
        world = World(tracker, size)
        (gathered,) = world.play(numel, lambda link, f: select.allgather(link, f, bounds, 5))
        (sent,) = world.play(numel, lambda link, f: select.broadcast(link, f, 1, 5))
        (scattered,) = world.play(numel, lambda link, f: select.reduce_scatter(link, f, bounds, ReduceOp.SUM, 5, 0.5))
    whole = torch.cat([values(rank, numel)[slice(*bounds[rank])] for rank in range(size)])
    assert all(torch.equal(result, whole) for result in gathered)
    assert all(torch.equal(result, values(1, numel)) for result in sent)
    for own, result in zip(bounds, scattered, strict=True):
        assert torch.equal(result[slice(*own)], total(size, numel, scale=0.5)[slice(*own)])
    apart = ["broadcast"] * 3, ["reduce"] * 3
    assert world.nodes[0].ran == (
        ["allGather", "broadcast", "reduceScatter"] if numel == 99 else [*apart[0], "broadcast", *apart[1]]
    )


def test_between_nodes_by_the_ring() -> None:
    with Tracker() as tracker:
        world = World(tracker, 2, nodes=2)
        (results,) = world.play(9000, allreduce(0.5))
    assert all(torch.equal(result, total(4, 9000, scale=0.5)) for result in results)
    assert all({"reduce", "broadcast"} >= set(node.ran) or "reduceScatter" in node.ran for node in world.nodes)
    assert all(node.ran for node in world.nodes)


def test_many_at_once_are_enqueued_in_one_order() -> None:
    """Whatever the order in which each rank resumes them; beside others that go another way, on the same streams."""
    for seed in range(20):
        with Tracker() as tracker:
            world = World(tracker, 3, seed=seed)
            found = world.play(40, *(allreduce(1.0, tag, is_ordered=tag == 3) for tag in range(6)))
        assert len(world.nodes[0].ran) == 5
        for number, results in enumerate(found):
            assert all(torch.equal(result, total(3, 40 + number)) for result in results)


def test_without_turns_it_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def at_once(link: Any, group: Nccl, *_: Any):  # type: ignore[no-untyped-def]
        return group.next, []
        yield

    monkeypatch.setattr(nccl, "_turn", at_once)
    with pytest.raises(AssertionError, match="different orders"):
        for seed in range(20):
            with Tracker() as tracker:
                World(tracker, 3, seed=seed).play(40, *(allreduce(1.0, tag) for tag in range(5)))


def test_what_nccl_does_otherwise_is_done_by_others() -> None:
    """Deterministic sums, dtypes that it lacks, and the minimum of floats, whose NaN it drops."""
    with Tracker() as tracker:
        world = World(tracker, 3)
        world.play(60, allreduce(1.0))
        (ordered,) = world.play(60, allreduce(1.0, is_ordered=True))
        (short,) = world.play(60, allreduce(1.0), dtype=torch.int16)
        (least,) = world.play(60, allreduce(1.0, op=ReduceOp.MIN))
    assert all(torch.equal(result, total(3, 60)) for result in ordered)
    assert all(torch.equal(result, total(3, 60, torch.int16)) for result in short)
    assert all(torch.equal(r, torch.stack([values(k, 60) for k in range(3)]).amin(0)) for r in least)
    assert world.nodes[0].ran == ["allReduce"]
    assert takes(torch.int32, "MIN") and not takes(torch.float32, "MAX") and not takes(torch.bool, "SUM")


def test_a_tensor_on_another_gpu_than_the_communicators() -> None:
    """On one rank: all take the other way."""
    with Tracker() as tracker:
        world = World(tracker, 3)
        world.play(60, allreduce(1.0))
        group = world.within[1].ways.nccl
        assert group is not None
        group.device = torch.device("cuda", 1)
        (results,) = world.play(60, allreduce(0.5))
    assert all(torch.equal(result, total(3, 60, scale=0.5)) for result in results)
    assert world.nodes[0].ran == ["allReduce"]


@pytest.mark.parametrize("obstacle", ["cupy", "shared", "start"])
def test_refused_on_all_ranks_and_said_once(obstacle: str, caplog: pytest.LogCaptureFixture) -> None:
    with Tracker() as tracker, caplog.at_level(logging.WARNING, "mpiddp"):
        world = World(tracker, 3)
        if obstacle == "cupy":

            def missing() -> Any:
                raise ImportError("cupy is missing")

            world.links[1].ways.nccl_library = missing
        elif obstacle == "shared":
            world.links[2].driver.gpu = world.links[0].driver.gpu
        else:
            world.libraries[1].fails_at = "start"
        for _ in range(2):
            (results,) = world.play(60, allreduce(0.5))
            assert all(torch.equal(result, total(3, 60, scale=0.5)) for result in results)
    assert not world.nodes[0].ran and all(link.ways.nccl is None for link in world.links)
    (record,) = caplog.records
    said = {
        "cupy": "local rank 1: cupy is missing",
        "shared": "local ranks 0, 2 share GPU-gpu-0",
        "start": "local rank 1",
    }
    assert "CUDA IPC is tried" in record.getMessage() and said[obstacle] in record.getMessage()
    assert obstacle != "start" or [each.closed for each in world.libraries] == ["aborted", "", "aborted"]


@pytest.mark.parametrize("call", ["allReduce", "check"])
def test_an_error_names_the_rank_and_the_tensor(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Tracker() as tracker:
        world = World(tracker, 2)
        world.play(60, allreduce(1.0))
        world.libraries[1].fails_at = call
        monkeypatch.setattr("tests.fake_device.FakeEvent.query", lambda self: False)  # it is not done before it fails
        handle = Handle("bucket 3")
        link = world.links[1]
        flat = link.driver.tensor(values(1, 60))
        running = Running([handle], crossing(link, flat, link.ways.devices.depart(flat), allreduce(1.0)))  # type: ignore[arg-type]
        other = world.links[0]
        flat = other.driver.tensor(values(0, 60))
        peer = crossing(other, flat, other.ways.devices.depart(flat), allreduce(1.0))  # type: ignore[arg-type]
        while not handle.done:
            next(peer, None)
            running.resume()
            world.network.deliver()
    assert type(handle.error) is CollectiveError
    assert "'bucket 3'" in str(handle.error) and "local rank 1" in str(handle.error), handle.error
    assert "SYSTEM_ERROR" in str(handle.error)
    with pytest.raises(NcclError):
        list(nccl.broadcast(link, link.ways.nccl, flat, 0, 5, lambda _: None))  # type: ignore[arg-type,return-value]


def test_its_end() -> None:
    for is_clean, expected in ((True, "destroyed"), (False, "aborted")):
        with Tracker() as tracker:
            world = World(tracker, 2)
            world.play(60, allreduce(1.0))
            for link in world.links:
                link.ways.close(is_clean)
                link.ways.close(is_clean)
        assert [library.closed for library in world.libraries] == [expected] * 2
        assert all(link.ways.nccl is None for link in world.links)


def test_kernels_are_timed_for_who_wants_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    with Tracker() as tracker:
        world = World(tracker, 2)
        world.play(60, allreduce(1.0))
        device: Device = world.links[0].ways.devices.of(torch.empty(0))
        device.times = []
        world.play(60, allreduce(1.0))
        assert len(device.times) == 1


def test_who_can() -> None:
    assert problem([("a", ""), ("b", "")]) == ""
    assert problem([("a", ""), ("a", ""), ("b", "")]) == "local ranks 0, 1 share GPU-a, and NCCL needs one each"
    assert problem([("a", ""), ("", "no cupy")]) == "local rank 1: no cupy"


def test_a_start_that_blocks_keeps_nobody_from_pushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in a thread of its own; whatever it raises is told."""
    monkeypatch.undo()
    with Tracker() as tracker:
        link: FakeLink = World(tracker, 1).links[0]
    link.driver.on = lambda stream: tracker.acting(link.driver.host)  # type: ignore[method-assign]
    gate = threading.Event()

    def start() -> Nccl:
        gate.wait(20)
        raise ValueError("no GPU")

    starting = nccl._Starting(start, link.ways, torch.device("cpu"))
    assert starting.is_alive()
    gate.set()
    starting.join(20)
    assert (starting.group, starting.why) == (None, "no GPU")
