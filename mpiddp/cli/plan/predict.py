"""The table: one row for each number of nodes."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from ... import runtime
from ...config import Config
from ...dtypes import BY_NAME
from ...optimizer.network import Network, bucket_nbytes
from ..bench.models import LOCAL, MODELS, Training, parameter_count
from ..bench.place import Place, arrive, leave, say
from ..bench.sizes import size_text
from ..bench.table import Column, Report, Row, number
from ..bench.timing import Limits, Timed, interleaved
from .measure import Meter, measure
from .model import BACKWARD, Figures, allreduce, buckets, exposed_s

__all__ = ["COLUMNS", "Work", "described", "row", "run"]

COLUMNS = (
    Column("nodes", "nodes", 5),
    Column("ranks", "ranks", 5),
    Column("algorithm", "algorithm", 13, is_left=True),
    Column("buckets", "buckets", 7),
    Column("exchange_ms", "exchange ms", 11, number(2)),
    Column("exposed_ms", "exposed ms", 10, number(2)),
    Column("step_ms", "step ms", 9, number(2)),
    Column("efficiency", "efficiency", 10, lambda value: f"{100 * value:.1f} %"),
)

_WIDTH = 2048
_LIMITS = Limits(rounds=20, seconds=5.0)


@dataclass(frozen=True)
class Work:
    """Gradients of so many bytes, and the seconds of a step that exchanges nothing, if known."""

    nbytes: int
    step_s: float | None


def run(arguments: Namespace) -> int:
    """Measure, and write what ``arguments`` ask for. Collective; returns the exit code."""
    place = arrive()
    here = runtime.current()
    code = 0
    if here.world.is_homogeneous:
        _plan(arguments, place, here)
    else:
        code = 2
        ranks = [here.world.nodes.count(node) for node in sorted(set(here.world.nodes))]
        say(f"# the nodes have {ranks} ranks, and the formulas are for as many on each: start so many on each")
    leave(place)
    return code


def _plan(arguments: Namespace, place: Place, here: runtime.Runtime) -> None:
    dtype = BY_NAME[arguments.dtype]
    figures = measure(Meter(here, place.comm), dtype, here.config.segment_kb << 10)
    work = _work(arguments, dtype.itemsize, place)
    for text in described(figures, max(here.world.nodes) + 1, work):
        say(text)
    wanted = here.channel.link.algorithm
    with Report(COLUMNS, arguments.csv, place.rank == 0) as report:
        for nodes in arguments.nodes:
            report.add(row(nodes, figures, work, here.config, wanted))


def _work(arguments: Namespace, itemsize: int, place: Place) -> Work:
    """What is trained, and how long a step of it takes without any exchange."""
    given = None if arguments.step_ms is None else arguments.step_ms / 1e3
    if arguments.parameters is not None:
        return Work(arguments.parameters * itemsize, given)
    model = MODELS[arguments.model or "mlp"]
    training = Training(model, _WIDTH, None, "sgd", LOCAL, place.rank)
    nbytes = parameter_count(training.module) * itemsize
    if given is not None:
        return Work(nbytes, given)
    timed = Timed(LOCAL, lambda: [training.step] * (model.steps + 1))
    return Work(nbytes, interleaved([timed], _LIMITS, place.comm)[LOCAL].median)


def row(nodes: int, figures: Figures, work: Work, config: Config, wanted: str = "") -> Row:
    """One number of nodes. ``efficiency`` is the local step over the whole one, each rank's batch staying as it is."""
    nbytes = config.bucket_nbytes
    if config.bucket_mb is None and nodes > 1:
        network = Network(figures.network.short_s, figures.network.byte_s)
        nbytes = bucket_nbytes(network, nodes, figures.local_size, work.nbytes)
    sizes = buckets(work.nbytes, config.first_bucket_nbytes, nbytes)
    found = [allreduce(nodes, nbytes, figures, wanted) for nbytes in sizes]
    seconds = [each for _, each in found]
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    exposed = step = None
    if work.step_s is not None:
        exposed = exposed_s(sizes, seconds, BACKWARD * work.step_s)
        step = work.step_s + exposed
    return {
        "nodes": nodes,
        "ranks": nodes * figures.local_size,
        "algorithm": found[largest][0] if nodes * figures.local_size > 1 else None,
        "buckets": len(sizes),
        "exchange_ms": round(sum(seconds) * 1e3, 3),
        "exposed_ms": None if exposed is None else round(exposed * 1e3, 3),
        "step_ms": None if step is None else round(step * 1e3, 3),
        "efficiency": None if step is None or work.step_s is None else round(work.step_s / step, 4),
    }


def described(figures: Figures, nodes: int, work: Work) -> Sequence[str]:
    """The lines above the table: what was measured, and of what the table is."""
    wire, local = figures.network, figures.local_size
    alphas = f"latency {wire.short_s * 1e6:.0f} us, {wire.long_s * 1e6:.0f} us for messages above 64 KiB"
    rate = f"{8e-9 * local / wire.byte_s:.3f} Gbit/s" if wire.byte_s else "boundless"
    if nodes == 1:
        lines = [
            f"# all ranks are on one node: this is its memory, by MPI, and no network: {alphas}, {rate} each way",
            "# the rows for more nodes stand for a network that is as fast as that; start ranks on two nodes",
        ]
    else:
        lines = [f"# between {nodes} nodes, {local} rank(s) of each at once: {alphas}, {rate} a node each way"]
    if local > 1:
        lines.append(
            f"# within a node: {figures.node_alpha_s * 1e6:.0f} us and {figures.node_byte_s * 1e9:.3f} ns a byte for "
            "an all-reduce"
        )
    lines.append(f"# adding what was received: {figures.add_byte_s * 1e9:.3f} ns a byte")
    if work.step_s is None:
        step = "--step-ms or --model would tell of steps"
    else:
        step = f"a step without any exchange takes {work.step_s * 1e3:.2f} ms, two thirds of it backward"
    return [*lines, f"# gradients of {size_text(work.nbytes)}; {step}"]
