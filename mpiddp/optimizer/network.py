"""How large buckets are that travel between hosts: by the latency and the rate of the network, measured once.

With p nodes, an all-reduce of n bytes takes about c + n b: c = 2(p-1) latencies and what Python adds, b = 2(p-1)/p of
the time that a byte takes. Gradients of N bytes in buckets of n cost N/n times c, and n b when backward has ended,
since the last bucket leaves then. The sum is least where n is the square root of N c/b.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
import weakref
from collections.abc import Sequence

import torch

from ..collectives import ReduceOp, doubling, pairs
from ..config import MIB
from ..engine import Channel, Engine, Lane
from ..transport.base import Link, Steps
from .options import Options

__all__ = ["Network", "bucket_nbytes", "network_of", "suited"]

#: What launching a bucket, and waiting for it, takes of Python's time, at 2 ranks.
_LAUNCH_S = 0.0001

_LEAST_NBYTES, _MOST_NBYTES = MIB, 25 * MIB

#: Messages for the latency; a first large one, that also empties what a shaped link lets pass in a burst; and if that
#: was quick, larger ones. 30 ms at 1 Gbit/s.
_SMALL_NBYTES, _FIRST_NBYTES, _LARGE_NBYTES = 1 << 10, 256 << 10, 1 << 20
_SMALL_ROUNDS, _LARGE_ROUNDS, _QUICK_S = 8, 2, 0.02

logger = logging.getLogger("mpiddp")

_known: weakref.WeakKeyDictionary[Channel, Network] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class Network:
    """Seconds of the smallest message between neighbours on two nodes, and of a byte while all ranks of both send and
    receive; the slowest pair's."""

    latency_s: float
    byte_s: float

    def __repr__(self) -> str:
        return f"{self.latency_s * 1e3:.2g} ms, {1e-6 / max(self.byte_s, 1e-12):.0f} MB/s a rank between hosts"


def bucket_nbytes(network: Network, nodes: int, ranks_per_node: int, gradient_nbytes: int) -> int:
    """The size of buckets for gradients of so many bytes: 1 to 25 MiB. Pure."""
    steps = 2 * (nodes - 1)
    fixed_s = steps * network.latency_s + _LAUNCH_S
    byte_s = max(steps / nodes / ranks_per_node * network.byte_s, 1e-12)
    wanted = math.sqrt(gradient_nbytes * fixed_s / byte_s)
    return int(min(_MOST_NBYTES, max(_LEAST_NBYTES, wanted)))


def suited(engine: Engine, lane: Lane, options: Options, gradient_nbytes: int) -> Options:
    """``options`` with the size of buckets that suits the network, where they ask for that. Blocking and collective."""
    if not options.nodes:
        return options
    network = network_of(engine, lane, options.nodes)
    levels = lane.link.levels
    nodes, within = (levels.cross.size, levels.local.size) if levels is not None else (lane.link.size, 1)
    chosen = bucket_nbytes(network, nodes, within, gradient_nbytes)
    if lane.link.rank == 0:
        logger.info("buckets of %.1f MiB for %.0f MiB: %r", chosen / MIB, gradient_nbytes / MIB, network)
    return dataclasses.replace(options, bucket_nbytes=chosen, nodes=())


def network_of(engine: Engine, lane: Lane, nodes: Sequence[int]) -> Network:
    """What is between ``nodes``, those of the lane's members; measured once. Blocking and collective."""
    known = _known.get(lane.channel)
    if known is None:
        known = _known[lane.channel] = _measure(engine, lane, nodes)
    return known


def _measure(engine: Engine, lane: Lane, nodes: Sequence[int]) -> Network:
    small = _largest(engine, lane, _exchange_s(engine, lane, nodes, _SMALL_NBYTES, _SMALL_ROUNDS))
    nbytes, seconds = _FIRST_NBYTES, _largest(engine, lane, _exchange_s(engine, lane, nodes, _FIRST_NBYTES, 1))
    if seconds < _QUICK_S:
        nbytes, seconds = _LARGE_NBYTES, _exchange_s(engine, lane, nodes, _LARGE_NBYTES, _LARGE_ROUNDS)
        seconds = _largest(engine, lane, seconds)
    return Network(small, max(0.0, seconds - small) / nbytes)


def _exchange_s(engine: Engine, lane: Lane, nodes: Sequence[int], nbytes: int, rounds: int) -> float:
    """The least time of a message out and one in at the same time: what disturbs one only adds to it."""
    source, target = (torch.zeros(nbytes, dtype=torch.uint8, device="cpu") for _ in range(2))
    peers, times = pairs.neighbours(nodes, lane.link.rank, within=False), []

    def start(link: Link, tag: int) -> Steps:
        return pairs.exchange(link, source, target, peers, nbytes, tag)

    for _ in range(rounds):
        _largest(engine, lane, 0.0)  # all begin together
        began = time.perf_counter()
        engine.wait(lane.launch("network", start))
        times.append(time.perf_counter() - began)
    return min(times)


def _largest(engine: Engine, lane: Lane, seconds: float) -> float:
    """The largest of all ranks, on every rank."""
    value = torch.tensor([seconds], dtype=torch.float64, device="cpu")
    engine.wait(lane.launch("network", lambda link, tag: doubling.allreduce(link, value, ReduceOp.MAX, tag)))
    return float(value)
