"""How fast pairs of ranks exchange, by the ways that collectives would take, one pair after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ...collectives import ReduceOp
from ...collectives.device_reduction import reduce_parts
from ...device import local_device
from ...engine.device import WHOLE_NBYTES
from ...memory.ipc import DeviceMemory
from ...op import Sum
from ...ops import allreduce_
from ...runtime import Runtime
from ...transport.base import Link
from ...transport.device import CUDA_AWARE, MAPPED, NCCL, STAGED
from ...transport.device import way_between as between_gpus
from .facts import Facts, Pair

__all__ = ["between_devices", "measure", "pairs_of", "try_mapping", "way_between"]

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


#: How a way between GPUs is called.
_GPU_WAYS = {NCCL: "NCCL", MAPPED: "CUDA IPC", CUDA_AWARE: "CUDA-aware MPI", STAGED: "staged through host memory"}


class _Figures(NamedTuple):
    """What one of a pair measured: bytes a second, seconds; the way between GPUs, if any, and its bytes a second."""

    rate: float
    latency: float
    gpu_way: str
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


def way_between(one: Facts, other: Facts, gpu_way: str = "") -> str:
    """How tensors in host memory travel between two ranks, in words; then GPUs', by the transport ``gpu_way``."""
    if one.node == other.node and one.memory not in ("", "private"):
        way = "shared memory"
    else:
        layer = one.pml or one.library.split(" v")[0]
        way = f"MPI ({layer}), {'same node' if one.node == other.node else 'between nodes'}"
    return f"{way}; GPUs: {_GPU_WAYS[gpu_way]}" if gpu_way else way


def try_mapping(runtime: Runtime, ranks: Sequence[Facts]) -> bool:
    """Let an exchange of tensors on GPUs find out whether the ranks of a node map each other's memory. False where
    some rank has none that its PyTorch can use. Collective."""
    is_there = ranks[runtime.world.rank].gpu.index is not None and torch.cuda.is_available()
    if not all(runtime.world.comm.allgather(is_there)):
        return False
    allreduce_(torch.zeros(2 * WHOLE_NBYTES, dtype=torch.uint8, device=local_device()), op=Sum)
    return True


def measure(runtime: Runtime, ranks: Sequence[Facts]) -> list[Pair]:
    """Measure the pairs in turn, while the others wait. Collective; the result is on all ranks."""
    world = runtime.world
    pairs = pairs_of(world.nodes)
    link, have_gpus = runtime.channel.link, try_mapping(runtime, ranks)
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
        gpu_way = between_gpus(link, peer, world.nodes[peer] == world.nodes[world.rank]) if have_gpus else ""
        found.append(_Figures(rate, _latency(world.comm, peer), gpu_way, _gpu_rate(world.comm, link, peer, gpu_way)))
    _together(world.comm)
    reports = world.comm.allgather(found)
    return [_pair(ranks, pair, [report[i] for report in reports]) for i, pair in enumerate(pairs)]


def _pair(ranks: Sequence[Facts], pair: tuple[int, int], figures: list[_Figures | None]) -> Pair:
    one, other = figures[pair[0]], figures[pair[1]]
    assert one is not None and other is not None
    rate, latency = min(one.rate, other.rate) / 1e9, max(one.latency, other.latency) * 1e6
    gpu = None if one.gpu_rate is None or other.gpu_rate is None else min(one.gpu_rate, other.gpu_rate) / 1e9
    way = way_between(ranks[pair[0]], ranks[pair[1]], one.gpu_way)
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


def _gpu_rate(comm: Any, link: Link, peer: int, way: str) -> float | None:
    """Between two ranks' GPUs, by this way; None where there is none, or which takes all ranks of the node."""
    if not way or way == NCCL:
        return None
    if way == MAPPED:
        within = link if link.levels is None else link.levels.local
        return _read_gpu(comm, peer, within.ways.memory)
    return between_devices(comm, peer, local_device(), way == CUDA_AWARE, LARGE_NBYTES)


def _read_gpu(comm: Any, peer: int, memory: DeviceMemory) -> float:
    """Bytes a second while both copy what the other's GPU holds."""
    device = local_device()
    with torch.cuda.device(device):
        own = memory.empty(LARGE_NBYTES, torch.uint8, device)
        record = memory.record(own)
        assert record is not None
        theirs, target = memory.tensor(comm.sendrecv(record, peer, source=peer), own), torch.empty_like(own)

        def once() -> None:
            reduce_parts(ReduceOp.SUM, [theirs], [target])
            torch.cuda.synchronize(device)

        rate = LARGE_NBYTES / _best(comm, peer, once, _ROUNDS)
        comm.Sendrecv(bytearray(1), peer, recvbuf=bytearray(1), source=peer)  # the peer reads ``own`` until here
    return rate


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
