"""How fast pairs of ranks exchange, by the way that collectives would take, one pair after another."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from ...runtime import Runtime
from .facts import Facts, Pair

__all__ = ["measure", "pairs_of", "way_between"]

#: Through MPI: large enough for bandwidth, small enough that 28 pairs over 1 Gbit/s take some seconds.
NBYTES = 4 << 20
#: Through shared memory: more than most caches hold.
SHARED_NBYTES = 32 << 20
_ROUNDS = 3
_PINGS = 20

#: Up to so many ranks all pairs are measured.
_ALL_PAIRS = 8


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
    segment = runtime.memory.segments.empty((SHARED_NBYTES,), torch.uint8)
    segment.fill_(1)  # untouched memory would be read as one page of zeros
    place = runtime.memory.segments.place(segment)
    places = world.comm.allgather(place)
    found: list[tuple[float, float] | None] = []
    for pair in pairs:
        world.comm.Barrier()
        if world.rank not in pair:
            found.append(None)
            continue
        peer = pair[1] if world.rank == pair[0] else pair[0]
        if way_between(ranks[world.rank], ranks[peer]).startswith("shared memory") and places[peer] is not None:
            local = sum(1 for rank in range(peer) if world.nodes[rank] == world.nodes[peer])
            found.append((_read(runtime.memory.tensor(local, places[peer], SHARED_NBYTES)), _latency(world.comm, peer)))
        else:
            found.append((_exchange(world.comm, peer), _latency(world.comm, peer)))
    world.comm.Barrier()
    reports = world.comm.allgather(found)
    return [_pair(ranks, pair, [report[i] for report in reports]) for i, pair in enumerate(pairs)]


def _pair(ranks: Sequence[Facts], pair: tuple[int, int], figures: list[tuple[float, float] | None]) -> Pair:
    one, other = figures[pair[0]], figures[pair[1]]
    assert one is not None and other is not None
    rate, latency = min(one[0], other[0]) / 1e9, max(one[1], other[1]) * 1e6
    return Pair(pair, way_between(ranks[pair[0]], ranks[pair[1]]), round(rate, 3), round(latency, 1))


def _read(theirs: torch.Tensor) -> float:
    """Bytes a second while both copy what the other has."""
    own = torch.ones(SHARED_NBYTES, dtype=torch.uint8)
    return SHARED_NBYTES / min(_timed(lambda: own.copy_(theirs)) for _ in range(_ROUNDS + 1))


def _exchange(comm: Any, peer: int) -> float:
    """Bytes a second in each direction while both send."""
    from mpi4py import MPI

    sent, received = (torch.zeros(NBYTES, dtype=torch.uint8).numpy() for _ in range(2))

    def once() -> None:
        MPI.Request.Waitall([comm.Irecv([received, MPI.BYTE], peer), comm.Isend([sent, MPI.BYTE], peer)])

    return NBYTES / min(_timed(once) for _ in range(_ROUNDS + 1))


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

    return min(_timed(once) for _ in range(_PINGS)) / 2


def _timed(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
