"""The all-reduce table: every size, every contender, in turn."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ... import runtime
from . import contenders, plot
from .contenders import Contender
from .gloo import close_gloo, open_gloo
from .place import Place, arrive, cache_nbytes, complain, leave, say
from .sizes import LARGE_FROM_NBYTES, algorithm_bandwidth, bus_bandwidth, calls_in_block, size_text
from .table import Column, Report, Row, number
from .timing import Limits, Timing, interleaved

__all__ = ["COLUMNS", "ROUNDS", "SECONDS", "available", "finish", "fitting", "prepared", "rows", "run"]

COLUMNS = (
    Column("size_bytes", "size", 9, size_text),
    Column("count", "count", 9),
    Column("dtype", "dtype", 8),
    Column("op", "op", 4),
    Column("ranks", "ranks", 5),
    Column("contender", "contender", 14, is_left=True),
    Column("time_us", "time us", 11, number(1)),
    Column("mean_us", "mean us", 11, number(1)),
    Column("algbw_GBs", "algbw GB/s", 10, number(3)),
    Column("busbw_GBs", "busbw GB/s", 10, number(3)),
    Column("time_over_mpiddp", "/ mpiddp", 9, number(2)),
    Column("time_over_shared", "/ shared", 9, number(2)),
)

#: Seconds for one size, unless ``--seconds`` says otherwise: the whole default table then takes less than a minute.
SECONDS = 3.0
ROUNDS = 30

#: At the most so many tensors of a size are there at once on each rank: those of two contenders' calls.
_TENSORS = 10


def run(arguments: Namespace) -> int:
    """Measure, and write what ``arguments`` ask for. Collective; returns the exit code."""
    place = arrive()
    if not prepared(arguments, place):
        return 2
    peers = available(arguments.peers, place)
    limits = Limits(arguments.rounds or ROUNDS, arguments.seconds or SECONDS)
    sweep = None if arguments.warm else torch.zeros(2 * cache_nbytes(), dtype=torch.uint8)
    state = "as its zeroing has left it" if sweep is None else "in memory, not in a cache"
    say(f"# from {size_text(LARGE_FROM_NBYTES)} a call finds its tensor {state}")
    with Report(COLUMNS, arguments.csv, place.rank == 0) as report:
        for nbytes in fitting(arguments.sizes, place):
            numel = max(1, nbytes // arguments.dtype.itemsize)
            for row in _measure(numel, arguments.dtype, peers, place, limits, sweep):
                report.add(row)
    return finish(report, arguments, place)


def prepared(arguments: Namespace, place: Place) -> bool:
    """Whether all that ``arguments`` ask for can be done; says what cannot. Collective."""
    problem = place.comm.bcast(plot.problem() if arguments.plot and place.rank == 0 else None, 0)
    if problem:
        complain(problem)
    return problem is None


def finish(report: Report, arguments: Namespace, place: Place) -> int:
    """Draw the table where that is asked for, and give everything back; the exit code. Collective."""
    close_gloo()
    if arguments.plot and place.rank == 0:
        plot.draw(report.rows, arguments.plot)
    leave(place)
    return 0


def available(peers: Sequence[str], place: Place) -> list[str]:
    """Those of ``peers`` that there are; says which are left out."""
    found = list(peers)
    if "gloo" in found:
        reason = open_gloo(place)
        if reason is not None:
            found.remove("gloo")
            say(f"# gloo is left out: {reason}")
    return found


def fitting(sizes: Sequence[int], place: Place, more_nbytes: int = 1 << 62) -> list[int]:
    """The sizes that memory has room for, on every node; ``more_nbytes``: this rank's share of another memory."""
    from mpi4py import MPI

    share = place.comm.allreduce(min(_free_nbytes() // runtime.local_size(), more_nbytes), op=MPI.MIN)
    large = [size_text(nbytes) for nbytes in sizes if _TENSORS * nbytes > share]
    if large:
        say(f"# {', '.join(large)} left out: a rank's share of the free memory is {size_text(share)}")
    return [nbytes for nbytes in sizes if _TENSORS * nbytes <= share]


def _free_nbytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """The memory that this node can still give, in bytes; boundless where the kernel does not tell."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return 1 << 62
    return next((int(text.split()[1]) << 10 for text in lines if text.startswith("MemAvailable")), 1 << 62)


def _measure(
    numel: int, dtype: torch.dtype, peers: Sequence[str], place: Place, limits: Limits, sweep: torch.Tensor | None
) -> list[Row]:
    """Check and time everybody at one size. Collective."""
    compared: list[Contender] = [contenders.own(), contenders.shared()]
    if "gloo" in peers:
        compared.append(contenders.gloo())
    library = contenders.library(place, dtype) if "mpi" in peers else None
    if library:
        compared.append(library)
    for contender in compared:
        contenders.check(contender, place, numel, dtype)
    compared.append(contenders.local())
    calls = calls_in_block(numel * dtype.itemsize)
    swept = sweep if numel * dtype.itemsize >= LARGE_FROM_NBYTES else None
    found = interleaved([contenders.block_of(c, numel, dtype, calls, swept) for c in compared], limits, place.comm)
    return rows(found, {c.name: c.op for c in compared}, numel, dtype, place.size)


def rows(
    timings: Mapping[str, Timing], ops: Mapping[str, str], numel: int, dtype: torch.dtype, ranks: int
) -> list[Row]:
    """The table's rows of one size, from each contender's time of a call."""
    nbytes = numel * dtype.itemsize
    return [
        {
            "size_bytes": nbytes,
            "count": numel,
            "dtype": str(dtype).removeprefix("torch."),
            "op": ops[name],
            "ranks": ranks,
            "contender": name,
            "time_us": round(each.median * 1e6, 3),
            "mean_us": round(each.mean * 1e6, 3),
            "algbw_GBs": round(algorithm_bandwidth(nbytes, each.median), 4),
            "busbw_GBs": round(bus_bandwidth(nbytes, each.median, ranks), 4) if ops[name] != "add" else None,
            "time_over_mpiddp": round(each.median / timings["mpiddp"].median, 4),
            "time_over_shared": round(each.median / timings["mpiddp shared"].median, 4),
        }
        for name, each in timings.items()
    ]
