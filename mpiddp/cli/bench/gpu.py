"""The all-reduce table for tensors on GPUs: the same, with the device synchronised before and after each call; what the
kernels take by themselves; and the transports from GPU to GPU beside plain copies.

A kernel is timed by events on its own stream. Where ranks share a GPU, which runs them in turn, its time may hold other
ranks' turns.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ... import runtime
from ...collectives.cuda_ipc import ONE_SHOT_NBYTES
from ...device import local_device
from ...engine import Lane
from ...engine.device import WHOLE_NBYTES
from ...transport.device import CUDA_AWARE, MAPPED, way_between
from . import accelerator, contenders, reduce
from .accelerator import Accelerator, Marks
from .place import Place, arrive, complain, say
from .sizes import LARGE_FROM_NBYTES, calls_in_block
from .table import Column, Report, Row, number
from .timing import Limits, Timed, interleaved
from .transports import ONE_WAY, TO_HOST, transports

__all__ = ["COLUMNS", "clocked", "kernel_nbytes", "measure", "rows", "run"]

COLUMNS = (
    *reduce.COLUMNS,
    Column("way", "way", 10, is_left=True),
    Column("kernel_us", "kernel us", 11, number(1)),
    Column("kernel_GBs", "kernel GB/s", 11, number(1)),
    Column("time_over_copy", "/ to host", 9, number(2)),
)


def run(arguments: Namespace) -> int:
    """Measure, and write what ``arguments`` ask for. Collective; returns the exit code."""
    place = arrive()
    if not reduce.prepared(arguments, place):
        return 2
    problem = accelerator.problem(place)
    if problem:
        complain(problem)
        return 2
    gpu = Accelerator(local_device())
    say(f"# {gpu.describe()}")
    say("# MPI_Allreduce takes no part: few MPIs reduce GPUs' memory, and most of the others crash")
    peers = reduce.available([peer for peer in arguments.peers if peer != "mpi"], place)
    limits = Limits(arguments.rounds or reduce.ROUNDS, arguments.seconds or reduce.SECONDS)
    sweep = None if arguments.warm else torch.zeros(2 * gpu.cache_nbytes(), dtype=torch.uint8, device=gpu.device)
    lane = runtime.current().channel.lane()
    with Report(COLUMNS, arguments.csv, place.rank == 0) as report:
        for nbytes in reduce.fitting(arguments.sizes, place, gpu.free_nbytes()):
            numel = max(1, nbytes // arguments.dtype.itemsize)
            for row in measure(gpu, numel, arguments.dtype, peers, place, limits, sweep, lane):
                report.add(row)
    return reduce.finish(report, arguments, place)


def measure(
    gpu: Accelerator,
    numel: int,
    dtype: torch.dtype,
    peers: Sequence[str],
    place: Place,
    limits: Limits,
    sweep: torch.Tensor | None,
    lane: Lane,
) -> list[Row]:
    """Check and time everybody at one size. Collective."""
    nbytes, device = numel * dtype.itemsize, gpu.device
    compared = [contenders.own(device), contenders.shared(device)]
    if "gloo" in peers:
        compared.append(contenders.gloo(device))
    for contender in compared:
        contenders.check(contender, place, numel, dtype)
    compared.append(contenders.local(device))
    if nbytes > WHOLE_NBYTES:
        compared += transports(gpu, lane, numel, dtype, runtime.current().cuda_aware.yes)
    calls, swept = calls_in_block(nbytes), sweep if nbytes >= LARGE_FROM_NBYTES else None
    marks: dict[str, Marks] = {each.name: [] for each in compared}
    timed = [contenders.block_of(each, numel, dtype, calls, swept) for each in compared]
    found = interleaved([clocked(each, gpu, marks[each.name]) for each in timed], limits, place.comm)
    gpu.watch(None)
    base = reduce.rows(found, {each.name: each.op for each in compared}, numel, dtype, place.size)
    kernels = {name: _median(pairs, place.comm) for name, pairs in marks.items()}
    return rows(base, kernels, _way(lane, nbytes), lane.link.levels is None)


def clocked(timed: Timed, gpu: Accelerator, marks: Marks) -> Timed:
    """The same, each call with all that it enqueues; what its kernels take goes to ``marks``."""

    def block() -> Sequence[Callable[[], object]]:
        calls = timed.block()
        if timed.name == contenders.LOCAL:
            calls = [partial(gpu.timed, call, marks) for call in calls]
        gpu.watch(marks)
        gpu.wait()
        return [partial(_wholly, call, gpu) for call in calls]

    return Timed(timed.name, block)


def _wholly(call: Callable[[], object], gpu: Accelerator) -> None:
    call()
    gpu.wait()


def _median(marks: Marks, comm: Any) -> float | None:
    """Seconds between two marks, on the rank where that is largest; None where there are none. Collective."""
    own = statistics.median(began.elapsed_time(ended) for began, ended in marks) / 1e3 if marks else None
    values = [value for value in comm.allgather(own) if value is not None]
    return max(values, default=None)


def _way(lane: Lane, nbytes: int) -> str | None:
    """How the library all-reduces so many bytes; two ways within the node and between nodes. None for one rank."""
    link, nodes = lane.link, runtime.current().world.nodes
    if link.size == 1:
        return None
    if nbytes <= WHOLE_NBYTES:
        return "whole"
    others = [rank for rank in range(link.size) if rank != link.rank]
    found = {way_between(link, rank, nodes[rank] == nodes[link.rank]) for rank in others}
    return "+".join(sorted(found)).replace(CUDA_AWARE, "cuda-aware")


def kernel_nbytes(contender: str, nbytes: int, ranks: int) -> int:
    """What one kernel reads and writes of an all-reduce of mapped buckets, or of ``x.add_(y)``."""
    if contender == contenders.LOCAL:
        return 3 * nbytes
    return (ranks + 1) * nbytes if nbytes <= ONE_SHOT_NBYTES else 2 * nbytes


def rows(base: Sequence[Row], kernels: Mapping[str, float | None], way: str | None, is_one_node: bool) -> list[Row]:
    """The table's rows of one size: ``base`` without what a copy has not, and what the kernels took, in seconds.

    On several nodes a call has several kernels, of several sizes, so nothing is said of them.
    """
    copy = next((row["time_us"] for row in base if row["contender"] == TO_HOST), None)
    found: list[Row] = []
    for row in base:
        name, is_copy = row["contender"], row["op"] == "copy"
        is_own, seconds = name.startswith("mpiddp"), kernels[name]
        if is_own and (way != MAPPED or not is_one_node):
            seconds = None
        nbytes = kernel_nbytes(name, row["size_bytes"], row["ranks"])
        without = dict.fromkeys(("busbw_GBs", "time_over_mpiddp", "time_over_shared")) if is_copy else {}
        more = {
            "way": way if is_own else None,
            "kernel_us": None if seconds is None else round(seconds * 1e6, 3),
            "kernel_GBs": None if seconds is None else round(nbytes / seconds / 1e9, 2),
            "time_over_copy": round(row["time_us"] / copy, 4) if copy and name in ONE_WAY.values() else None,
        }
        found.append({**row, **without, **more})
    return found
