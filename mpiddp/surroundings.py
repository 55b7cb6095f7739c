"""What ``init()`` finds out before the engine starts: who is where, what all agreed on, whose GPU is which.

MPI is started on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING

from . import agreement, binding, config, gpus, launch, log, worker
from .config import Config
from .log import logger
from .transport.probe import Answer, cuda_aware
from .worker import Topology
from .world import World, is_mpi_running, library_name, start_mpi

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Surroundings", "look_around"]


@dataclass(frozen=True)
class Surroundings:
    """Where this rank is. In ``config`` ``cuda_aware`` is what MPI does, not what was wished for."""

    world: World
    topology: Topology
    config: Config
    gpu: gpus.Placement
    cuda_aware: Answer


def look_around(comm: MPI.Intracomm | Sequence[int] | None, wished: Config) -> Surroundings:
    """Start MPI if need be, find out who is where, agree on the settings; ``wished`` are this rank's own. Collective.

    ``comm`` is ``init()``'s. Raises LaunchError where MPI is not usable, or knows of fewer ranks than the launcher.
    """
    started = launch.detect(config.environ())
    prepared = launch.before_mpi(wished)
    inquiry = gpus.ask()
    mpi_ran = is_mpi_running()
    everyone = start_mpi().COMM_WORLD
    library = library_name()
    launch.check_size(started, everyone.Get_size(), config.environ(), library)
    # Where MPI starts here, all ranks have come so far together; else the others may be late.
    end_job = None if mpi_ran else partial(everyone.Abort, 1)
    with launch.first_words(wished.init_timeout_s, f"rank {everyone.Get_rank()}", end_job, library):
        world = World.over(comm)
        log.bind(world.rank, world.host)
        settings = agreement.agree(world.comm, wished, library)
    topology = Topology(*(getattr(world, field.name) for field in fields(Topology)))
    worker.publish(topology)
    launch.after_mpi(config.environ())
    _say(world, prepared.lost, started.kind)
    gpu = gpus.place(world.node_comm, inquiry.answer())
    with_nccl = settings.local == "nccl"
    answer = cuda_aware(world.comm, world.nodes, gpu.index, library, settings.cuda_aware, with_nccl=with_nccl)
    _say_of_gpus(world, gpu, answer, settings.cuda_aware)
    return Surroundings(world, topology, replace(settings, cuda_aware=answer.yes), gpu, answer)


def _say(world: World, lost: str | None, kind: str) -> None:
    """What users should know, once a job or once a node."""
    if lost and world.rank == 0:
        logger.warning("%s", lost)
    foreign = launch.foreign_launcher_here()
    if foreign and world.local_rank == 0:
        logger.warning("%s", foreign)
    facts = world.node_comm.gather(binding.facts(), 0)
    for warning in binding.warnings_for_node(facts, kind) if facts else []:
        logger.warning("%s", warning)


def _say_of_gpus(world: World, gpu: gpus.Placement, answer: Answer, wanted: bool | None) -> None:
    """What MPI does with GPUs' memory, once a job and only where there are any."""
    if world.rank == 0 and (gpu.index is not None or answer.cure):
        say = logger.warning if wanted and not answer.yes else logger.info
        way = "go to MPI as they are" if answer.yes else "that peers cannot map go by way of host memory"
        say("tensors on GPUs %s: %s%s", way, answer.why, f"; {answer.cure}" if answer.cure else "")
