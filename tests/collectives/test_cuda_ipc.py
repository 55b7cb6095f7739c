"""Collectives over memory that all ranks of a node map, on a device that notices what nothing orders."""

from __future__ import annotations

import logging

import pytest
import torch

from mpiddp.collectives import ReduceOp, chunk_bounds, cuda_ipc, select
from mpiddp.dtypes import scale_
from mpiddp.engine import device as engine_device
from mpiddp.engine.device import Start, crossing
from mpiddp.memory.ipc import RECORD_NBYTES, TOKEN_NBYTES
from mpiddp.memory.streams import Device
from mpiddp.transport.base import Levels
from mpiddp.transport.device import STAGED
from tests.fake_device import FakeDriver, FakeEvent, FakeNetwork, Race, Tracker
from tests.simulation import run


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_device, "WHOLE_NBYTES", 0)
    monkeypatch.setattr(cuda_ipc, "ONE_SHOT_NBYTES", 200)


class FakeMemory:
    """One rank's device memory; ``node`` are all ranks' exported tensors, by number."""

    def __init__(self, driver: FakeDriver, node: dict[int, torch.Tensor], refusing: str = "") -> None:
        self.driver, self.node, self.refusing = driver, node, refusing
        self.opened = 0

    def empty(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        flat = torch.empty(numel, dtype=dtype)
        self.driver.tracker.put_on_device(flat)
        self.node[len(self.node) + 1] = flat
        return flat

    def record(self, tensor: torch.Tensor) -> bytes | None:
        for number, flat in self.node.items():
            if flat.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                return f"{number} {tensor.data_ptr() - flat.data_ptr()}".encode().ljust(RECORD_NBYTES)
        return None

    def tensor(self, record: bytes, like: torch.Tensor) -> torch.Tensor:
        number, offset = (int(word) for word in record.split())
        self.opened += 1
        return self.node[number].view(torch.uint8)[offset : offset + like.nbytes].view(like.dtype)

    def token(self, device: torch.device) -> bytes:
        if self.refusing.startswith("no driver"):
            raise OSError(self.refusing)
        return b"token".ljust(TOKEN_NBYTES, b".")

    def problem(self, token: bytes, device: torch.device) -> str:
        assert token.startswith(b"token")
        return self.refusing


def play(
    size: int,
    numel: int,
    start: Start,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    exported: object = True,
    refusing: str = "",
    nodes: int = 1,
) -> tuple[list[torch.Tensor], list[FakeMemory]]:
    """``start`` on each rank's tensor. ``exported``: whether peers can map it, or the ranks where they can."""
    with Tracker() as tracker:
        network = FakeNetwork(tracker, size * nodes, seed)
        links = network.fake_links(lambda *_: STAGED)
        shared: list[dict[int, torch.Tensor]] = [{} for _ in range(nodes)]
        memories, flats = [], []
        for link in links:
            place = link.rank // size
            memories.append(FakeMemory(link.driver, shared[place], refusing if link.rank == 1 else ""))
            within = link
            if nodes > 1:
                ranks = range(place * size, (place + 1) * size)
                within = link.among(ranks)
                link.levels = Levels(within, link.among([link.rank % size + size * n for n in range(nodes)]))  # type: ignore[arg-type,assignment]
            within.ways.can_map, within.ways.memory = True, memories[-1]
            flat = values(link.rank, numel, dtype)
            if exported is True or (isinstance(exported, set) and link.rank in exported):
                room = memories[-1].empty(numel, dtype, flat.device)
                with link.driver.on(link.driver.user):
                    room.copy_(flat)
                flats.append(room)
            else:
                flats.append(link.driver.tensor(flat))
        passages = [link.ways.devices.depart(flat) for link, flat in zip(links, flats, strict=True)]
        run(network, [crossing(*each, start) for each in zip(links, flats, passages, strict=True)])  # type: ignore[arg-type]
        assert network.idle(), "messages were left behind"
        for passage in passages:
            passage.land()
        return [link.driver.read(flat) for link, flat in zip(links, flats, strict=True)], memories


def values(rank: int, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.arange(numel) * (rank + 1) % 7 + rank).to(dtype)


def total(size: int, numel: int, dtype: torch.dtype, scale: float) -> torch.Tensor:
    return scale_(sum((values(r, numel, dtype) for r in range(size)), torch.zeros(numel, dtype=dtype)), scale)


def allreduce(scale: float) -> Start:
    return lambda link, flat: select.allreduce(link, flat, ReduceOp.SUM, 5, scale, 64)


@pytest.mark.parametrize("exported", [True, False, {0, 2}], ids=["buckets", "user's tensors", "mixed"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_allreduce(size: int, exported: object) -> None:
    for numel, dtype in ((0, torch.float32), (1, torch.int64), (30, torch.float32), (101, torch.bfloat16)):
        for seed in range(3):
            results, memories = play(size, numel, allreduce(0.5), seed, dtype, exported)
            assert all(torch.equal(result, total(size, numel, dtype, 0.5)) for result in results)
            assert numel == 0 or all(memory.opened == size - 1 for memory in memories)


@pytest.mark.parametrize("exported", [True, False])
def test_other_collectives(exported: bool) -> None:
    size, numel = 3, 100
    bounds = chunk_bounds(numel, size)
    gathered = torch.cat([values(rank, numel)[slice(*bounds[rank])] for rank in range(size)])
    for result in play(size, numel, lambda link, f: select.allgather(link, f, bounds, 5), exported=exported)[0]:
        assert torch.equal(result, gathered)
    for result in play(size, numel, lambda link, f: select.broadcast(link, f, 1, 5), exported=exported)[0]:
        assert torch.equal(result, values(1, numel))
    scattered, _ = play(
        size, numel, lambda link, f: select.reduce_scatter(link, f, bounds, ReduceOp.SUM, 5, 0.5), exported=exported
    )
    for rank, result in enumerate(scattered):
        assert torch.equal(result[slice(*bounds[rank])], total(size, numel, torch.float32, 0.5)[slice(*bounds[rank])])


@pytest.mark.parametrize("refusing", ["invalid device ordinal", "no driver at all"])
def test_a_handle_that_does_not_open(refusing: str, caplog: pytest.LogCaptureFixture) -> None:
    """All ranks take the next transport, and the cause is named once."""
    with caplog.at_level(logging.WARNING, "mpiddp"):
        results, memories = play(3, 101, allreduce(1.0), refusing=refusing)
    assert all(torch.equal(result, total(3, 101, torch.float32, 1.0)) for result in results)
    assert not any(memory.opened for memory in memories)
    (record,) = caplog.records
    assert "local rank 1" in record.getMessage() and refusing in record.getMessage()
    assert "--gpu-bind=none" in record.getMessage()


@pytest.mark.parametrize("numel", [30, 101])
def test_kernels_are_timed_for_who_wants_to_know(numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the exchange stream, and nothing but the kernels: neither what comes before nor the way back."""
    times: list[tuple[FakeEvent, FakeEvent]] = []
    init = Device.__init__

    def watched(self: Device, *arguments: object) -> None:
        init(self, *arguments)  # type: ignore[arg-type]
        self.times = times

    monkeypatch.setattr(Device, "__init__", watched)
    play(3, numel, allreduce(0.5), exported=False)
    assert len(times) == 3 and all(began.elapsed_time(ended) > 0 for began, ended in times)


def test_between_nodes_by_the_ring() -> None:
    results, memories = play(2, 9000, allreduce(0.5), nodes=2)
    assert all(torch.equal(result, total(4, 9000, torch.float32, 0.5)) for result in results)
    assert all(memory.opened for memory in memories)


@pytest.mark.parametrize("numel", [30, 101])
@pytest.mark.parametrize("missing", ["_until_done", "barrier"])
def test_whatever_does_not_wait_is_noticed(missing: str, numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_):  # type: ignore[no-untyped-def]
        return
        yield

    monkeypatch.setattr(cuda_ipc if missing == "_until_done" else cuda_ipc.tree, missing, nothing)
    with pytest.raises(Race):
        for seed in range(20):
            play(3, numel, allreduce(1.0), seed)
