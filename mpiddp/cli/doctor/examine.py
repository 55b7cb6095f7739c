"""Collects the facts: first what each rank knows alone, then what MPI says, then what the running library says.

Each stage may fail; what is known by then is reported.
"""

from __future__ import annotations

import dataclasses
import platform
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ... import agreement, binding, config, launch, processes, runtime
from ...config import Config
from ...errors import ConfigError, LaunchError, MpiddpError
from ...transport.capability import capability
from ...world import World, library_name, start_mpi
from . import machine
from .facts import Facts, Job
from .measure import measure
from .watch import Watch

__all__ = ["examine", "look_alone", "wait_for_all"]


def look_alone() -> Facts:
    """What this rank knows before MPI starts."""
    environ = config.environ()
    settings, problem = _settings(environ)
    started = launch.detect(environ)
    return Facts(
        rank=started.rank or 0,
        size=1,
        host=socket.gethostname(),
        machine=machine.look(),
        launch=started,
        cpus=binding.facts(),
        versions={**agreement.versions(""), "Python": platform.python_version()},
        settings={**settings.agreed(), "OMPI_MCA_pml": environ.get("OMPI_MCA_pml", "")},
        ignored_horovod=tuple(config.ignored_horovod(environ)),
        config_problem=problem,
    )


def _settings(environ: Mapping[str, str]) -> tuple[Config, str]:
    try:
        return Config.from_environ(environ), ""
    except ConfigError as error:
        return Config(), str(error)


def examine(watch: Watch, alone: Facts, with_pairs: bool = True) -> tuple[Job, Facts]:
    """Everything, from all ranks; and this rank's own. Collective, unless MPI has left each alone."""
    watch.phase = "starting MPI"
    own, world = _with_mpi(watch, alone)
    if world is None:
        return Job((own,)), own
    watch.phase = "gathering the facts from all ranks"
    ranks = world.comm.allgather(own)
    world.free()
    if any(each.problem for each in ranks):
        return Job(tuple(ranks)), own
    watch.phase = "running mpiddp.init()"
    watch.known = own
    own = watch.known = _with_library(own)
    ranks = _everybody().allgather(own)
    if any(each.problem for each in ranks):
        return Job(tuple(ranks)), own
    watch.phase = "measuring between pairs of ranks"
    pairs = measure(runtime.current(), ranks) if with_pairs else []
    runtime.shutdown()
    return Job(tuple(ranks), tuple(pairs)), own


def wait_for_all() -> None:
    """Return when all ranks have called this. MPI has started."""
    _everybody().Barrier()


def _everybody() -> Any:
    from mpi4py import MPI

    return MPI.COMM_WORLD


def _with_mpi(watch: Watch, alone: Facts) -> tuple[Facts, World | None]:
    """MPI's answers; no world where this process is alone against the launcher's word, or MPI does not start."""
    try:
        launch.before_mpi(_settings(config.environ())[0])
        mpi = start_mpi()
    except ConfigError as error:
        return dataclasses.replace(alone, config_problem=_first_line(error)), None
    except (MpiddpError, ImportError, RuntimeError, OSError) as error:
        return dataclasses.replace(alone, mpi_problem=_first_line(error)), None
    own = _of_mpi(alone)
    try:
        launch.check_size(alone.launch, mpi.COMM_WORLD.size, config.environ(), own.library)
    except LaunchError as error:
        return dataclasses.replace(own, size_problem=str(error)), None
    watch.phase, watch.known = "finding out who shares a node", own
    world = World.over(None)
    return dataclasses.replace(
        own,
        rank=world.rank,
        size=world.size,
        node=world.nodes[world.rank],
        local_rank=world.local_rank,
        thread_level=world.thread_level,
    ), world


def _of_mpi(alone: Facts) -> Facts:
    import mpi4py

    library, launcher, environ = library_name(), processes.daemon(), config.environ()
    pml = capability(False, library, False, False).pml
    chosen = ["UCX_NET_DEVICES"] if pml == "ucx" else ["OMPI_MCA_btl_tcp_if_include"]
    chosen = chosen if "open mpi" in library.lower() else ["FI_TCP_IFACE", "UCX_NET_DEVICES"]
    return dataclasses.replace(
        alone,
        versions={**alone.versions, "MPI": library, "mpi4py": mpi4py.__version__},
        library=library,
        libmpi=processes.libmpi_path() or "",
        launcher_exe=launcher.exe if launcher else "",
        pml=pml,
        has_ucx_ib="libuct_ib" in _maps(),
        tcp_included=",".join(environ[name] for name in chosen if name in environ),
        tcp_excluded=environ.get("OMPI_MCA_btl_tcp_if_exclude", ""),
    )


def _maps() -> str:
    try:
        return Path("/proc/self/maps").read_text(errors="replace")
    except OSError:
        return ""


def _with_library(own: Facts) -> Facts:
    try:
        runtime.init()
    except (MpiddpError, RuntimeError, OSError) as error:
        return dataclasses.replace(own, init_problem=_first_line(error))
    here = runtime.current()
    shared = ("memory files" if here.memory.is_lazy else "named files") if here.memory.is_shared else "private"
    return dataclasses.replace(own, memory=shared, gpu=here.gpu, cuda_aware=here.cuda_aware)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
