"""How fast pairs of ranks exchange, by the ways that collectives would take, one pair after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ...runtime import Runtime
from .facts import Facts, Pair

__all__ = ["between_devices", "measure", "pairs_of", "way_between"]

#: Through MPI: large enough for bandwidth, small enough that 28 pairs over 1 Gbit/s take some seconds.
NBYTES = 4 << 20
#: Through shared memory, and between GPUs: more than most caches hold.
LARGE_NBYTES = 32 << 20
_ROUNDS = 3
_PINGS = 20

#: Up to so many ranks all pairs are measured.
_ALL_PAIRS = 8

#: Ranks that wait for a pair look this seldom: spinning, they would take the cores from it.
_WAIT_S = 0.001


class _Figures(NamedTuple):
    """What one of a pair measured: bytes a second, seconds, bytes a second between GPUs."""

    rate: float
    latency: float
    gpu_rate: float | None


def pairs_of(nodes: Sequence[int]) -> list[tuple[int, int]]:
    """The pairs to measure; ``nodes[r]`` is rank r's node. Of many ranks: each with its node's first, and those firsts
    in a ring."""
    size = len(nodes)
    if size <= _ALL_PAIRS:
        return [(a, b) for a in range(size) for b in range(a + 1, size)]
    firsts = [nodes.index(node) for node in sorted(set(nodes))]
    within = [(nodes.index(node), rank) for rank, node in enumerate(nodes) if nodes.index(node) != rank]
    ring = [(a, b) for a, b in zip(firsts, firsts[1:] + firsts[:1], strict=True) if a != b]
    return within + sorted({(min(pair), max(pair)) for pair in ring})


def way_between(one: Facts, other: Facts) -> str:
    """How tensors in host memory travel between two ranks, in words; then GPUs' where both have one."""
    if one.node == other.node and one.memory not in ("", "private"):
        way = "shared memory"
    else:
        layer = one.pml or one.library.split(" v")[0]
        way = f"MPI ({layer}), {'same node' if one.node == other.node else 'between nodes'}"
    if one.gpu.index is not None and other.gpu.index is not None:
        way += "; GPUs: " + ("as they are" if one.cuda_aware.yes else "by host memory")
    return way


def measure(runtime: Runtime, ranks: Sequence[Facts]) -> list[Pair]:
    """Measure the pairs in turn, while the others wait. Collective; the result is on all ranks."""
    world = runtime.world
    pairs = pairs_of(world.nodes)
    segment = runtime.memory.segments.empty((LARGE_NBYTES,), torch.uint8)
    segment.fill_(1)  # untouched memory would be read as one page of zeros
    places = world.comm.allgather(runtime.memory.segments.place(segment))
    found: list[_Figures | None] = []
    for pair in pairs:
        _together(world.comm)
        if world.rank not in pair:
            found.append(None)
            continue
        peer = pair[1] if world.rank == pair[0] else pair[0]
        if way_between(ranks[world.rank], ranks[peer]).startswith("shared memory") and places[peer] is not None:
            local = sum(1 for rank in range(peer) if world.nodes[rank] == world.nodes[peer])
            rate = _read(world.comm, peer, runtime.memory.tensor(local, places[peer], LARGE_NBYTES))
        else:
            rate = between_devices(world.comm, peer, torch.device("cpu"), True, NBYTES)
        found.append(_Figures(rate, _latency(world.comm, peer), _gpu_rate(world.comm, ranks, world.rank, peer)))
    _together(world.comm)
    reports = world.comm.allgather(found)
    return [_pair(ranks, pair, [report[i] for report in reports]) for i, pair in enumerate(pairs)]


def _pair(ranks: Sequence[Facts], pair: tuple[int, int], figures: list[_Figures | None]) -> Pair:
    one, other = figures[pair[0]], figures[pair[1]]
    assert one is not None and other is not None
    rate, latency = min(one.rate, other.rate) / 1e9, max(one.latency, other.latency) * 1e6
    gpu = None if one.gpu_rate is None or other.gpu_rate is None else min(one.gpu_rate, other.gpu_rate) / 1e9
    way = way_between(ranks[pair[0]], ranks[pair[1]])
    return Pair(pair, way, round(rate, 3), round(latency, 1), None if gpu is None else round(gpu, 3))


def _together(comm: Any) -> None:
    """A barrier that leaves the cores to whoever measures."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(_WAIT_S)


def _read(comm: Any, peer: int, theirs: torch.Tensor) -> float:
    """Bytes a second while both copy what the other has."""
    own = torch.ones(LARGE_NBYTES, dtype=torch.uint8)
    return LARGE_NBYTES / _best(comm, peer, lambda: own.copy_(theirs), _ROUNDS)


def _gpu_rate(comm: Any, ranks: Sequence[Facts], rank: int, peer: int) -> float | None:
    """Between two ranks' GPUs, where both have one and this PyTorch can use it."""
    index = ranks[rank].gpu.index
    if index is None or ranks[peer].gpu.index is None or not torch.cuda.is_available():
        return None
    return between_devices(comm, peer, torch.device("cuda", index), ranks[rank].cuda_aware.yes, LARGE_NBYTES)


def between_devices(comm: Any, peer: int, device: torch.device, is_aware: bool, nbytes: int) -> float:
    """Bytes a second in each direction while both send from memory on ``device`` and receive there.

    ``is_aware``: MPI is given the device's memory; else it is copied to the host and back.
    """
    from mpi4py import MPI

    near = [torch.ones(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
    pinned = device.type == "cuda"
    host = near if is_aware else [torch.ones(nbytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
    received, sent = ([MPI.memory.fromaddress(tensor.data_ptr(), nbytes), MPI.BYTE] for tensor in host)

    def once() -> None:
        if not is_aware:
            host[1].copy_(near[1])
        MPI.Request.Waitall([comm.Irecv(received, peer), comm.Isend(sent, peer)])
        if not is_aware:
            near[0].copy_(host[0])
        if pinned:
            torch.cuda.synchronize(device)

    if pinned:
        torch.cuda.synchronize(device)  # MPI knows no streams: what is sent must be complete
    return nbytes / _best(comm, peer, once, _ROUNDS)


def _latency(comm: Any, peer: int) -> float:
    """Seconds for 8 bytes one way, by MPI: half of what there and back takes, the best of some."""
    note = bytearray(8)

    def once() -> None:
        if comm.rank < peer:
            comm.Send(note, peer)
            comm.Recv(note, peer)
        else:
            comm.Recv(note, peer)
            comm.Send(note, peer)

    return _best(comm, peer, once, _PINGS) / 2


def _best(comm: Any, peer: int, work: Callable[[], object], rounds: int) -> float:
    """The shortest of some rounds, in seconds, after one to warm up; the two begin each together."""
    times = []
    for _ in range(rounds + 1):
        comm.Sendrecv(bytearray(1), peer, recvbuf=bytearray(1), source=peer)
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times[1:])
