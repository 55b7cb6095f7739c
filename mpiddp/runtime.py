"""``init`` and ``shutdown``, and who this process is. The only global state of the library.

State: ``_runtime``, set by ``init()`` and cleared by ``shutdown()``, both in the thread that calls them; ``_child``,
the topology that a child process has from its parent. Everything acts only in the process that called ``init()``.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from . import config, failure, gpus, log, processes, worker
from .config import Config
from .engine import Channel, Engine, Presence
from .errors import ArgumentError, NotInitializedError, WorkerProcessError
from .log import logger
from .memory import NodeMemory
from .process_set import ProcessSet
from .sets import ProcessSets, open_channel
from .surroundings import Surroundings, look_around
from .timeline import Timeline, mark_ranges
from .transport.doorbell import Doorbell
from .transport.probe import Answer
from .worker import Topology
from .world import World, start_mpi

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = [
    "Runtime",
    "add_process_set",
    "cross_rank",
    "cross_size",
    "current",
    "init",
    "is_homogeneous",
    "is_initialized",
    "local_rank",
    "local_size",
    "rank",
    "remove_process_set",
    "shutdown",
    "size",
]


@dataclass(frozen=True)
class Runtime:
    """What ``init()`` made."""

    generation: int
    config: Config
    world: World
    topology: Topology
    engine: Engine
    channel: Channel
    sets: ProcessSets
    timeline: Timeline
    memory: NodeMemory
    gpu: gpus.Placement
    cuda_aware: Answer

    def channels(self) -> list[Channel]:
        """Those of all process sets that this rank belongs to, the world's first."""
        return list(self.engine.channels)

    def __repr__(self) -> str:
        return f"Runtime({self.world!r}, {self.engine!r})"


_runtime: Runtime | None = None
_child: Topology | None = None


def init(
    comm: MPI.Intracomm | Sequence[int] | None = None,
    process_sets: Sequence[ProcessSet] | str | None = None,
) -> None:
    """Start the library: start MPI if need be, find out who is where, agree on the settings. Collective.

    ``comm``: the ranks that take part: an mpi4py communicator (duplicated, never used itself), a list of world ranks,
    or None for all. ``process_sets``: those to add at once; or "dynamic", which is accepted and changes nothing, since
    sets can always be added. A second call does nothing; after ``shutdown()`` it starts anew. In a child process of a
    rank (a DataLoader worker, say) it starts no MPI: ``rank()`` and ``size()`` answer as in the parent there.

    Raises :class:`LaunchError` when the launcher started several ranks and MPI knows of one, or when MPI is not usable;
    :class:`ConfigError` for an unknown or malformed setting.
    """
    global _runtime, _child
    if _runtime is not None:
        return  # in a forked child too: it answers for its parent and may not communicate
    inherited = worker.inherited(config.environ())
    if inherited is not None:
        _child = inherited
        return
    if isinstance(process_sets, str) and process_sets.lower() != "dynamic":
        raise ArgumentError(f"process_sets={process_sets!r} is neither a list of process sets nor 'dynamic'")
    wished = Config.from_environ(config.environ())
    log.configure(wished.log_level)
    _runtime = runtime = _start(look_around(comm, wished))
    failure.install(runtime.world.rank, runtime.world.size, start_mpi().COMM_WORLD.Abort, runtime.engine.is_pushing)
    atexit.register(_at_exit)
    logger.debug("%r", runtime)
    mark_ranges(config.environ())
    if runtime.config.timeline:
        runtime.timeline.start(runtime.config.timeline, runtime.config.timeline_mark_cycles)
    for process_set in process_sets if process_sets and not isinstance(process_sets, str) else ():
        runtime.sets.add(process_set)


def _start(found: Surroundings) -> Runtime:
    """The engine and what it serves. Collective."""
    world, settings = found.world, found.config
    engine = Engine(world.thread_level, settings.progress_interval_ms / 1000, failure.act_on_pending)
    engine.observe(Presence.on_node(world.node_comm, world.rank), settings.stall_warn_s, settings.stall_abort_s)
    if max(world.nodes) > 0:
        engine.span_hosts(Doorbell.of_mpi() if world.local_size == 1 else None)
    memory = NodeMemory.over(world.node_comm)
    channel = open_channel(world.comm, range(world.size), world, settings, memory)
    channel.link.ways.devices.own = found.gpu.index
    engine.add(channel)
    sets = ProcessSets(world, settings, engine, channel, memory)
    timeline = Timeline(engine, channel, world.host, settings.exit_timeout_s)
    return Runtime(
        processes.generation(),
        settings,
        world,
        found.topology,
        engine,
        channel,
        sets,
        timeline,
        memory,
        found.gpu,
        found.cuda_aware,
    )


def shutdown() -> None:
    """Finish what is in flight, say goodbye to the other ranks, and give everything back; MPI itself stays up.

    Waits for the others for at most ``MPIDDP_EXIT_TIMEOUT_S``. Does nothing before ``init()`` and in a child process.
    """
    _stop(free=True)


def _at_exit() -> None:
    _stop(free=False)


def _stop(free: bool) -> None:
    global _runtime
    runtime = _runtime
    if runtime is None or runtime.generation != processes.generation():
        return
    from mpi4py import MPI

    failure.uninstall()
    worker.withdraw()
    atexit.unregister(_at_exit)
    together = False
    if not MPI.Is_finalized() and runtime.engine.may_push():
        together = _farewell(runtime)
    runtime.engine.presence.close()
    runtime.engine.stop(NotInitializedError("mpiddp was shut down; call mpiddp.init() again"))
    runtime.channel.close(together)
    _runtime = None
    runtime.sets.forget(free=together and free)
    runtime.memory.close()
    if together and free:
        runtime.world.free()
    log.bind(None, runtime.world.host)


def _farewell(runtime: Runtime) -> bool:
    """Tell the others at once, finish what is in flight, wait for them to leave too; False if some are not in time."""
    engine, channels, bound_s = runtime.engine, runtime.channels(), runtime.config.exit_timeout_s
    runtime.timeline.finish()
    steps = max(channel.steps for channel in channels)
    for channel in channels:
        engine.alone(partial(channel.leave, steps))
    together = engine.wait_until(lambda: all(c.is_over() for c in channels), "the other ranks' end", bound_s)
    for channel in () if together else channels:
        channel.give_up()
    return together and all(channel.departures.everybody for channel in channels)


def is_initialized() -> bool:
    """Whether ``init()`` has been called and ``shutdown()`` has not."""
    return _runtime is not None


def current() -> Runtime:
    """The runtime, for whoever communicates; raises where that is not possible."""
    if _runtime is not None and _runtime.generation == processes.generation():
        return _runtime
    if _runtime is not None or _child is not None or worker.inherited(config.environ()) is not None:
        raise _in_child()
    raise NotInitializedError("mpiddp is not initialized: call mpiddp.init() first")


def _in_child() -> WorkerProcessError:
    return WorkerProcessError(
        f"a collective was called in process {os.getpid()}, a child of rank {_who().rank} such as a DataLoader "
        "worker: MPI belongs to the rank's own process alone. Return the data to it and communicate there"
    )


def _who() -> Topology:
    if _runtime is not None:
        return _runtime.topology
    topology = _child or worker.inherited(config.environ())
    if topology is None:
        raise NotInitializedError("mpiddp is not initialized: call mpiddp.init() first")
    return topology


def rank() -> int:
    """This process's rank, 0 to ``size() - 1``. Raises NotInitializedError (a ValueError) before ``init()``."""
    return _who().rank


def size() -> int:
    """The number of ranks."""
    return _who().size


def local_rank() -> int:
    """The rank among the ranks of this node."""
    return _who().local_rank


def local_size() -> int:
    """The number of ranks on this node."""
    return _who().local_size


def cross_rank() -> int:
    """The rank among the ranks of all nodes that have this one's local rank."""
    return _who().cross_rank


def cross_size() -> int:
    """The number of nodes that have a rank of this one's local rank."""
    return _who().cross_size


def is_homogeneous() -> bool:
    """Whether every node has the same number of ranks."""
    return _who().is_homogeneous


def add_process_set(process_set: ProcessSet | Sequence[int]) -> ProcessSet:
    """Make a process set usable, given as such or by its ranks. Collective over all ranks, members or not.

    Raises ArgumentError (a ValueError) if it exists already or has ranks outside the world, MismatchError if ranks add
    different sets.
    """
    return current().sets.add(process_set)


def remove_process_set(process_set: ProcessSet) -> bool:
    """Forget a process set. Collective over all ranks; False if it was not added, or is the world's own."""
    return current().sets.remove(process_set)
