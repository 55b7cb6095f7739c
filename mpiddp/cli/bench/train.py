"""Training steps: local ones, mpiddp's, DDP's over gloo, step by step in turn.

Local ones run in processes of their own (:mod:`~mpiddp.cli.bench.apart`), and once more beside mpiddp's.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from ...errors import CollectiveError
from .apart import Apart
from .gloo import close_gloo, open_gloo
from .models import (
    BESIDE,
    DDP,
    FUSED,
    LOCAL,
    MODELS,
    OPTIMIZERS,
    OWN,
    SHARDED,
    Model,
    Training,
    can_shard,
    parameter_count,
)
from .place import Place, arrive, leave, say
from .table import Column, Report, Row, number
from .timing import Limits, Timed, Timing, interleaved

__all__ = ["COLUMNS", "rows", "run"]

COLUMNS = (
    Column("model", "model", 6, is_left=True),
    Column("parameters", "parameters", 10),
    Column("optimizer", "optimizer", 9, is_left=True),
    Column("ranks", "ranks", 5),
    Column("way", "way", 14, is_left=True),
    Column("step_ms", "step ms", 9, number(2)),
    Column("over_local", "/ local", 7, number(2)),
    Column("above_local_ms", "above local", 11, number(2)),
    Column("of_what_ddp_adds", "/ DDP's", 8, number(2)),
)

#: Seconds for one model and optimizer, unless ``--seconds`` says otherwise.
SECONDS = 8.0
ROUNDS = 50


def run(arguments: Namespace) -> int:
    """Measure, and write what ``arguments`` ask for. Collective; returns the exit code."""
    place = arrive()
    ways = _ways(arguments.peers, place)
    limits = Limits(arguments.rounds or ROUNDS, arguments.seconds or SECONDS)
    with Report(COLUMNS, arguments.csv, place.rank == 0) as report:
        for model in arguments.models or MODELS:
            for optimizer in arguments.optimizers or OPTIMIZERS:
                for row in _measure(model, optimizer, ways, arguments, place, limits):
                    report.add(row)
    close_gloo()
    leave(place)
    return 0


def _ways(peers: Sequence[str], place: Place) -> list[str]:
    """The ways of training that there are; says which are left out."""
    ways = [BESIDE, OWN]
    if can_shard():
        ways.append(SHARDED)
    else:
        say("# mpiddp sharded is left out: this DistributedOptimizer takes no shard=True")
    if "gloo" in peers:
        reason = open_gloo(place)
        if reason is None:
            ways.append(DDP)
        else:
            say(f"# DDP over gloo is left out: {reason}")
    return ways


def _measure(
    name: str, optimizer: str, ways: Sequence[str], arguments: Namespace, place: Place, limits: Limits
) -> list[Row]:
    """Time one model with one optimizer, in all ways. Collective."""
    model = MODELS[name]
    how = arguments.width, arguments.batch_size, optimizer
    alone = (LOCAL, FUSED)
    apart = Apart(name, how, alone, place.rank)
    trainings = {way: Training(model, *how, way, place.rank) for way in ways}
    timed = [_timed(way, partial(apart.step, way), model, tells_time=True) for way in alone]
    timed += [_timed(way, training.step, model) for way, training in trainings.items()]
    found = interleaved(timed, limits, place.comm)
    apart.close()
    for way, training in trainings.items():
        if way != BESIDE:
            _check(f"{name} with {optimizer}, {way}", training, place)
    return rows(found, name, parameter_count(trainings[OWN].module), optimizer, place.size)


def _timed(way: str, step: Callable[[], object], model: Model, tells_time: bool = False) -> Timed:
    return Timed(way, lambda: [step] * (model.steps + 1), tells_time)


def _check(what: str, training: Training, place: Place) -> None:
    """Replicas that have come apart were not trained together, however fast; raises CollectiveError. Collective."""
    prints = place.comm.allgather(training.fingerprint())
    differing = [rank for rank, value in enumerate(prints) if value != prints[0]]
    if differing:
        raise CollectiveError(
            f"after the same steps of {what} the parameters of rank {differing[0]} sum up to {prints[differing[0]]!r}, "
            f"those of rank 0 to {prints[0]!r}: its gradients were not the same"
        )


def rows(timings: Mapping[str, Timing], model: str, parameters: int, optimizer: str, ranks: int) -> list[Row]:
    """The table's rows of one model, from each way's time of a step.

    ``of_what_ddp_adds`` is the time above a local step in parts of what DDP adds; none where DDP adds nothing.
    """
    seconds = {way: timing.median for way, timing in timings.items()}
    local = seconds[LOCAL]
    added = seconds[DDP] - local if DDP in seconds else 0.0
    return [
        {
            "model": model,
            "parameters": parameters,
            "optimizer": optimizer,
            "ranks": ranks,
            "way": way,
            "step_ms": round(each * 1e3, 4),
            "over_local": round(each / local, 4),
            "above_local_ms": round((each - local) * 1e3, 4) if way != LOCAL else None,
            "of_what_ddp_adds": round((each - local) / added, 4) if added > 0 and way in (OWN, SHARDED) else None,
        }
        for way, each in seconds.items()
    ]
