"""Collectives over device tensors, by every way, on a device that notices what no event orders."""

from __future__ import annotations

import pytest
import torch

from mpiddp.collectives import ReduceOp, chunk_bounds, select
from mpiddp.engine import Kind, Request, Signature
from mpiddp.engine import device as engine_device
from mpiddp.engine.device import How, Start, crossing
from mpiddp.engine.execute import exchange
from mpiddp.engine.member import Run
from mpiddp.engine.mismatch import describe
from mpiddp.errors import MpiddpError
from mpiddp.memory import pinned, streams
from mpiddp.transport import staged
from mpiddp.transport.device import CUDA_AWARE, STAGED
from tests.fake_device import FakeLink, FakeNetwork, FakeStream, Race, Tracker
from tests.simulation import run

WAYS = {
    "staged": lambda *_: STAGED,
    "cuda-aware": lambda *_: CUDA_AWARE,
    "by pair": lambda rank, peer: CUDA_AWARE if (rank + peer) % 3 else STAGED,
}
SEGMENT_NBYTES = 64


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits so low that a few elements reach them."""
    monkeypatch.setattr(engine_device, "WHOLE_NBYTES", 16)
    monkeypatch.setattr(staged, "PIECE_NBYTES", 24)
    monkeypatch.setattr(staged, "MOST", 2)


def values(rank: int, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.arange(numel) * (rank + 1) % 7 + rank).to(dtype)


def play(
    size: int,
    numel: int,
    start: Start,
    way: str = "staged",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    how: How = How.BY_SIZE,
) -> list[torch.Tensor]:
    """``start`` on each rank's device tensor; what the user's streams see afterwards."""
    with Tracker() as tracker:
        network = FakeNetwork(tracker, size, seed)
        links = network.fake_links(WAYS[way])
        flats = [link.driver.tensor(values(link.rank, numel, dtype)) for link in links]
        passages = [link.ways.devices.depart(flat) for link, flat in zip(links, flats, strict=True)]
        run(
            network,
            [
                crossing(link, flat, passage, start, how)
                for link, flat, passage in zip(links, flats, passages, strict=True)
            ],
        )
        assert network.idle(), "messages were left behind"
        for passage in passages:
            passage.land()
        return [link.driver.read(flat) for link, flat in zip(links, flats, strict=True)]


def allreduce(link: FakeLink, flat: torch.Tensor):  # type: ignore[no-untyped-def]
    return select.allreduce(link, flat, ReduceOp.SUM, 5, 0.5, SEGMENT_NBYTES)  # type: ignore[arg-type]


def total(size: int, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return sum((values(rank, numel, dtype) for rank in range(size)), torch.zeros(numel, dtype=dtype))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_allreduce(size: int, way: str) -> None:
    for numel in (0, 1, 3, size + 1, 40, 101):
        for result in play(size, numel, allreduce, way, seed=numel):
            assert torch.equal(result, 0.5 * total(size, numel))


def test_zeros_of_a_rank_that_has_joined_lie_on_its_own_device() -> None:
    """Whatever the current device of the thread that pushes is; on one that it has used, if any."""
    with Tracker() as tracker:
        devices = FakeNetwork(tracker, 1).fake_links(WAYS["staged"])[0].ways.devices
    devices.own = 3
    assert devices.home == torch.device("cuda", 3)
    devices.of(torch.ones(1))
    assert devices.home == torch.device("cpu")


@pytest.mark.parametrize("way", ["staged", "cuda-aware"])
def test_many_schedules(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "DOUBLING_NBYTES", 100)  # the ring, and recursive doubling
    for seed in range(30):
        size, numel = 2 + seed % 3, (20, 120)[seed % 2]
        for result in play(size, numel, allreduce, way, seed, torch.float64):
            assert torch.equal(result, 0.5 * total(size, numel, torch.float64))


def test_ordered() -> None:
    def start(link: FakeLink, flat: torch.Tensor):  # type: ignore[no-untyped-def]
        return select.allreduce(link, flat, ReduceOp.SUM, 5, 1.0, SEGMENT_NBYTES, is_ordered=True)  # type: ignore[arg-type]

    for dtype in (torch.float32, torch.bfloat16):
        for result in play(3, 90, start, "cuda-aware", dtype=dtype):
            assert torch.equal(result, total(3, 90, dtype))


@pytest.mark.parametrize("way", ["staged", "cuda-aware"])
def test_other_collectives(way: str) -> None:
    size, numel = 3, 100
    bounds = chunk_bounds(numel, size)

    def broadcast(link: FakeLink, flat: torch.Tensor):  # type: ignore[no-untyped-def]
        return select.broadcast(link, flat, 1, 5)  # type: ignore[arg-type]

    def allgather(link: FakeLink, flat: torch.Tensor):  # type: ignore[no-untyped-def]
        return select.allgather(link, flat, bounds, 5, SEGMENT_NBYTES)  # type: ignore[arg-type]

    def scatter(link: FakeLink, flat: torch.Tensor):  # type: ignore[no-untyped-def]
        return select.reduce_scatter(link, flat, bounds, ReduceOp.SUM, 5, 1.0, SEGMENT_NBYTES)  # type: ignore[arg-type]

    gathered = torch.cat([values(rank, numel)[slice(*bounds[rank])] for rank in range(size)])
    assert all(torch.equal(result, values(1, numel)) for result in play(size, numel, broadcast, way))
    assert all(torch.equal(result, gathered) for result in play(size, numel, allgather, way))
    for rank, result in enumerate(play(size, numel, scatter, way)):
        assert torch.equal(result[slice(*bounds[rank])], total(size, numel)[slice(*bounds[rank])])


KINDS = {
    "allreduce": Signature(int(Kind.ALLREDUCE), "float32", (60,), int(ReduceOp.SUM), scale=0.5),
    "adasum": Signature(int(Kind.ALLREDUCE), "float32", (60,), int(ReduceOp.ADASUM)),
    "broadcast": Signature(int(Kind.BROADCAST), "float32", (60,), root=1),
    "allgather": Signature(int(Kind.ALLGATHER), "float32", (10,)),
    "alltoall": Signature(int(Kind.ALLTOALL), "float32", (10,)),
    "reducescatter": Signature(int(Kind.REDUCESCATTER), "float32", (6, 10), int(ReduceOp.SUM)),
}


@pytest.mark.parametrize(("name", "count"), [*((name, 1) for name in KINDS), ("allreduce", 3), ("broadcast", 3)])
def test_what_the_engine_runs(name: str, count: int) -> None:
    """Every kind, and what is fused: on a device as on the host."""
    signature, size = KINDS[name], 2
    extents = {"allgather": [(2,), (4,)], "alltoall": [(1, 5), (4, 2)]}.get(name, [(), ()])
    rows = [sum(extent) or 6 for extent in extents]
    with Tracker() as tracker:
        outcomes = []
        for is_on_device in (False, True):
            network = FakeNetwork(tracker, size)
            links = network.fake_links(WAYS["staged"])
            runs = []
            for link in links:
                requests = []
                for number in range(count):
                    flat = values(link.rank + number, rows[link.rank] * 10)
                    flat = link.driver.tensor(flat) if is_on_device else flat
                    requests.append(
                        Request(f"{number}", signature, flat, lambda value: value, None, extents[link.rank])
                    )
                    requests[-1].passage = link.ways.devices.depart(flat) if is_on_device else None
                runs.append(Run(requests, extents, None, None, []))
            run(network, [exchange(link, (0, 1), runs[link.rank], 5, 64) for link in links])  # type: ignore[arg-type]
            assert network.idle()
            outcomes.append([_seen(link, request) for link in links for request in runs[link.rank].requests])
    for on_host, on_device in zip(*outcomes, strict=True):
        assert len(on_host) == len(on_device)
        assert all(torch.equal(a, b) for a, b in zip(on_host, on_device, strict=True))


def _as_it_is(value: object) -> object:
    return value


def _seen(link: FakeLink, request: Request) -> list[torch.Tensor]:
    """The parts of a result, as the user's stream sees them once it has waited."""
    assert request.done and request.error is None, request.error
    parts = list(request.result) if isinstance(request.result, tuple) else [request.result]
    if request.passage is None:
        return parts
    request.passage.land()
    return [link.driver.read(part) for part in parts]


def test_a_tensor_on_a_device_and_one_that_is_not() -> None:
    """A mismatch that names the ranks and where their tensors lie."""
    there, here = Signature(0, "float32", (3,), device="cuda"), Signature(0, "float32", (3,), device="cpu")
    said = describe("x", [(0, there), (1, here), (2, there)], (0, 1, 2))
    assert "the device is cuda on ranks 0, 2; cpu on rank 1" in said


def test_by_a_whole_copy() -> None:
    for result in play(3, 50, allreduce, how=How.WHOLE):
        assert torch.equal(result, 0.5 * total(3, 50))


def _skip(stream: str):  # type: ignore[no-untyped-def]
    """A stream that does not wait."""

    def break_it(patch: pytest.MonkeyPatch) -> None:
        def wait_event(self: FakeStream, event: object) -> None:
            if not self.name.startswith(stream):
                self.follow(event.clock)  # type: ignore[attr-defined]

        patch.setattr(FakeStream, "wait_event", wait_event)

    return break_it


def _trust_queries(patch: pytest.MonkeyPatch) -> None:
    """The host does not look whether the device is done."""
    patch.setattr("tests.fake_device.FakeEvent.query", lambda self: True)


def _reuse_at_once(patch: pytest.MonkeyPatch) -> None:
    real = pinned.Pinned.give_back
    patch.setattr(pinned.Pinned, "give_back", lambda self, buffer, after=None: real(self, buffer))


def _do_not_land(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(streams.Passage, "land", lambda self: None)


@pytest.mark.parametrize(
    ("break_it", "way"),
    [
        (_skip("stream 1"), "staged"),
        (_skip("stream 1"), "cuda-aware"),
        (_skip("stream 2"), "staged"),
        (_skip("stream 3"), "staged"),
        (_trust_queries, "staged"),
        (_trust_queries, "cuda-aware"),
        (_reuse_at_once, "staged"),
        (_do_not_land, "staged"),
    ],
)
def test_whatever_does_not_wait_is_noticed(break_it, way: str, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """The fake is worth something: without any of the events it faults."""
    break_it(monkeypatch)
    monkeypatch.setattr(select, "DOUBLING_NBYTES", 0)
    with pytest.raises(Race):
        for seed in range(20):
            play(2, 200, allreduce, way, seed)


def test_a_graph_that_is_captured_is_refused() -> None:
    with Tracker() as tracker:
        link = FakeNetwork(tracker, 1).fake_links(WAYS["staged"])[0]
        flat = link.driver.tensor(torch.ones(3))
        link.driver.capturing = True
        with pytest.raises(MpiddpError, match="CUDA graph"):
            link.ways.devices.depart(flat)


def test_a_bucket_waits_for_all_streams_that_filled_it() -> None:
    """Autograd accumulates each gradient on the stream of its forward."""
    with Tracker() as tracker:
        driver = FakeNetwork(tracker, 1).drivers[0]
        bucket = driver.tensor(torch.zeros(8))
        makers = streams.Makers(streams.Devices(driver), [bucket])
        side = driver.make_stream(bucket.device)
        with driver.on(side):
            bucket[:4].copy_(torch.ones(4))
            makers.note(0, bucket)
        with driver.on(driver.user):
            bucket[4:].copy_(torch.ones(4))
            makers.note(0, bucket)
        with pytest.raises(Race):
            driver.read(bucket)
        with driver.on(driver.user):
            makers.gather(0, bucket)
        assert torch.equal(driver.read(bucket), torch.ones(8))
