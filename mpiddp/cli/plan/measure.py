"""What the formulas need, measured between these ranks, through the engine as gradients travel. Collective.

Between nodes every rank exchanges with the rank of its place on another node: both directions of each node's link are
busy, and all of its ranks share it, as in the algorithms.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ...collectives import ReduceOp, pairs, select
from ...runtime import Runtime
from ...transport.base import Link, Steps
from .model import Figures, Wire, calibrated

__all__ = ["Meter", "measure"]

#: Of messages that MPI sends at once, and of those before which it asks. The rate comes from the large ones.
_SHORT_NBYTES, _LONG_NBYTES, _LARGE_NBYTES = 4 << 10, 128 << 10, 8 << 20

#: A node's all-reduces, between which a line is drawn.
_NODE_NBYTES = (64 << 10, 8 << 20)

ROUNDS = 7

#: What disturbs a message only adds to its time, so that the figure is the lower quartile.
_MESSAGE_ROUNDS, _UNDISTURBED = 15, 0.25

#: Small all-reduces take longer while the system has two ranks on one core: for seconds, at times.
_SHORT_ROUNDS = 60


class Meter:
    """Times exchanges on a lane of its own."""

    def __init__(self, runtime: Runtime, comm: Any) -> None:
        self.world, self._engine, self._comm = runtime.world, runtime.engine, comm
        self.lane = runtime.channel.lane()

    def seconds(
        self, start: Callable[[Link, int], Steps], launches: int = 1, rounds: int = ROUNDS, part: float = 0.5
    ) -> float:
        """The time of ``start``, launched so many times in a row, on the rank where it is largest.

        The median of the rounds, or what another ``part`` of them remains below.
        """
        times = []
        for _ in range(rounds + 1):
            self._comm.Barrier()
            began = time.perf_counter()
            for _ in range(launches):
                self._engine.wait(self.lane.launch("plan", start))
            times.append(self._largest(time.perf_counter() - began) / launches)
        return sorted(times[1:])[int(part * rounds)]

    def allreduce(self, flat: torch.Tensor, segment_nbytes: int, launches: int = 1, rounds: int = ROUNDS) -> float:
        """Seconds of an all-reduce of ``flat``, as buckets of gradients have it."""

        def start(link: Link, tag: int) -> Steps:
            return select.allreduce(link, flat, ReduceOp.SUM, tag, 1.0, segment_nbytes)

        return self.seconds(start, launches, rounds)

    def node_allreduce(self, flat: torch.Tensor, launches: int) -> float:
        """Seconds of an all-reduce among the ranks of a node."""

        def start(link: Link, tag: int) -> Steps:
            return select.allreduce(link.levels.local if link.levels else link, flat, ReduceOp.SUM, tag)

        return self.seconds(start, launches)

    def wire(self, within: bool, segment_nbytes: int) -> Wire:
        """Between nodes, or within them."""
        short = self._message(_SHORT_NBYTES, _SHORT_NBYTES, within, 32)
        long = self._message(_LONG_NBYTES, _LONG_NBYTES, within, 8)
        large = self._message(_LARGE_NBYTES, min(segment_nbytes, _LARGE_NBYTES), within, 1)
        byte_s = max(0.0, (large - short) / _LARGE_NBYTES)
        return Wire(max(0.0, short - _SHORT_NBYTES * byte_s), max(0.0, long - _LONG_NBYTES * byte_s), byte_s)

    def _message(self, nbytes: int, segment_nbytes: int, within: bool, launches: int) -> float:
        """Seconds of a message out and one in at the same time, cut into segments."""
        partners = [pairs.neighbours(self.world.nodes, self.world.rank, within, turn) for turn in range(2)]
        turns = itertools.cycle(partners)
        source, target = (torch.ones(nbytes, dtype=torch.uint8) for _ in range(2))

        def start(link: Link, tag: int) -> Steps:
            return pairs.exchange(link, source, target, next(turns), segment_nbytes, tag)

        return self.seconds(start, launches, _MESSAGE_ROUNDS, _UNDISTURBED)

    def addition(self, dtype: torch.dtype, nbytes: int) -> float:
        """Seconds a byte to add a received piece of so many bytes, all ranks at the same time."""
        x, y = (torch.ones(nbytes // dtype.itemsize, dtype=dtype) for _ in range(2))
        several, times = 8, []
        for _ in range(ROUNDS + 1):
            self._comm.Barrier()
            began = time.perf_counter()
            for _ in range(several):
                x.add_(y)
            times.append(self._largest(time.perf_counter() - began) / several)
        return statistics.median(times[1:]) / nbytes

    def _largest(self, seconds: float) -> float:
        return float(max(self._comm.allgather(seconds)))


def measure(meter: Meter, dtype: torch.dtype, segment_nbytes: int) -> Figures:
    """Everything; on one node the network's figures are those of MPI within it."""
    nodes = meter.world.nodes
    is_one = len(set(nodes)) == 1
    within = meter.wire(True, segment_nbytes)
    network = within if is_one else meter.wire(False, segment_nbytes)
    alpha = byte_s = 0.0
    if meter.world.local_size > 1:
        small, large = (
            meter.node_allreduce(torch.ones(nbytes // dtype.itemsize, dtype=dtype), launches)
            for nbytes, launches in zip(_NODE_NBYTES, (16, 2), strict=True)
        )
        byte_s = max(0.0, (large - small) / (_NODE_NBYTES[1] - _NODE_NBYTES[0]))
        alpha = max(0.0, small - _NODE_NBYTES[0] * byte_s)
    add_byte_s = meter.addition(dtype, segment_nbytes)
    found = Figures(meter.world.local_size, network, within, alpha, byte_s, add_byte_s, segment_nbytes)
    if is_one:
        return found
    flat = torch.ones(_SHORT_NBYTES // dtype.itemsize, dtype=dtype)
    seconds = meter.allreduce(flat, segment_nbytes, 32, _SHORT_ROUNDS)
    return calibrated(max(nodes) + 1, _SHORT_NBYTES, seconds, found)
