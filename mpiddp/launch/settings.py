"""The settings that Open MPI reads when it starts, chosen from facts that are equal on all ranks.

Ranks that choose another point-to-point layer than their peers abort in MPI_Init. So nothing here depends on a probe, a
device or an installed package; what does depend on the node (yield, the interfaces that it leaves out) concerns no
peer. Other MPIs ignore all of it.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .. import config as configuration
from .. import processes
from ..config import Config
from ..errors import ConfigError
from .detect import Launch, detect
from .interfaces import Interface, interfaces, leading_nowhere
from .ucx import load_ucx, mpi_is_wheel, settings_reach_all, ucx_settings

__all__ = ["TCP", "Prepared", "before_mpi", "choose_settings", "chosen_parameters", "conf_files", "is_open"]

_PREFIX = "OMPI_MCA_"
_CONF_NAME = "openmpi-mca-params.conf"
_ASSIGNMENT = re.compile(r"^\s*([A-Za-z0-9_]+)\s*=\s*(.*?)\s*$", re.MULTILINE)

#: Without these TCP means nothing. Open MPI's default flags, less PUT: with it the two directions of a link take turns,
#: because what grants the next piece of one waits behind the data of the other, and a ring or MPI_Allreduce of 32 MiB
#: between 2 hosts took 290 to 480 ms over 1 Gbit/s in place of 281. Larger pieces then cost less of the CPU, and
#: several connections a pair carry more where the way is long.
TCP = {"btl_tcp_flags": "313", "btl_tcp_max_send_size": str(1 << 20), "btl_tcp_links": "2"}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What :func:`before_mpi` set, and one line for the user about what could not be set."""

    settings: dict[str, str]
    lost: str | None = None


def conf_files(environ: Mapping[str, str], prefix: Path = Path(sys.prefix)) -> list[Path]:
    """The files of parameters that Open MPI would read, first come first served: those that the user names, the user's
    own, the installation's. ``prefix`` is Python's."""
    named = environ.get("OMPI_MCA_mca_base_param_files", "")
    found = [Path(p) for p in re.split("[,:]", named) if p]
    if home := environ.get("HOME"):
        found.append(Path(home, ".openmpi", "mca-params.conf"))
    installation = _installation(environ, prefix)
    if installation is not None:
        # Debian keeps what belongs to /usr under /etc; the file of another installation says nothing about this one.
        found.append(
            Path("/etc/openmpi") / _CONF_NAME if installation == Path("/usr") else installation / "etc" / _CONF_NAME
        )
    return found


def _installation(environ: Mapping[str, str], prefix: Path) -> Path | None:
    """The MPI that will be loaded: mpi4py looks beside Python first. Else where the launcher or a module says it is."""
    if any((prefix / "lib").glob("libmpi.so*")):
        return prefix
    for name in ("OPAL_PREFIX", "MPI_HOME", "EBROOTOPENMPI"):
        if environ.get(name):
            return Path(environ[name])
    mpirun = shutil.which("mpirun", path=environ.get("PATH", ""))
    return Path(mpirun).resolve().parent.parent if mpirun else None


def choose_settings(
    config: Config,
    environ: Mapping[str, str],
    files: Iterable[Path],
    launch: Launch,
    node_cpus: int,
    is_wheel: bool = True,
    node_interfaces: Sequence[Interface] = (),
) -> dict[str, str]:
    """The ``OMPI_MCA_*`` variables to set before MPI starts; nothing that the user, the launcher or a file has chosen.

    ``files`` are Open MPI's files of parameters, ``node_cpus`` the number of CPUs that this node's ranks may use,
    ``is_wheel`` whether MPI is the wheel in Python's environment, ``node_interfaces`` those that MPI would find here.
    """
    chosen = chosen_parameters(environ, files)
    # The layer itself is left to Open MPI, which knows the fabric: ob1 would lose it.
    wanted = {**TCP, **_left_out(chosen, node_interfaces)}
    if config.fault_tolerant:  # ob1 is the only layer that survives the death of a peer
        wanted |= {"pml": "ob1"} if is_open(chosen, "ob1") and settings_reach_all(launch) else {}
    elif config.cuda_aware and is_wheel:
        wanted |= ucx_settings(launch, chosen.get("pml"), is_open(chosen, "ucx"))
    if (launch.local_size or 1) > node_cpus:
        # A rank that spins keeps its peer from the core: a 4-byte all-reduce took 4 ms without.
        wanted["mpi_yield_when_idle"] = "1"
    return {_PREFIX + name: value for name, value in wanted.items() if name == "pml" or name not in chosen}


def _left_out(chosen: Mapping[str, str], node_interfaces: Sequence[Interface]) -> dict[str, str]:
    """The interfaces that lead to no other host, unless somebody has chosen some; Open MPI takes one of two lists."""
    names = leading_nowhere(node_interfaces)
    if not names or any(name in chosen for name in ("btl_tcp_if_include", "btl_tcp_if_exclude")):
        return {}
    return {"btl_tcp_if_exclude": ",".join(["127.0.0.1/8", "sppp", *names])}  # the first two are the default


def is_open(chosen: Mapping[str, str], layer: str) -> bool:
    """Whether nobody has chosen a layer, nor excluded this one: ``pml = ^ucx``, as Debian has it, chooses none."""
    for value in (chosen.get("pml", "^"), chosen.get("btl", "^")):
        if not value.startswith("^") or layer in value[1:].split(","):
            return False
    return True


def chosen_parameters(environ: Mapping[str, str], files: Iterable[Path]) -> dict[str, str]:
    """The parameters that somebody has set already, without their prefix; the environment goes before the files."""
    values = {n[len(_PREFIX) :]: value for n, value in environ.items() if n.startswith(_PREFIX)}
    for path in files:
        if path.is_file():
            for name, value in _ASSIGNMENT.findall(path.read_text(errors="replace")):
                values.setdefault(name, value)
    return values


def _refuse_contradictions(config: Config) -> None:
    if config.cuda_aware and config.fault_tolerant:  # no layer of Open MPI does both
        raise ConfigError(
            "MPIDDP_CUDA_AWARE=1 needs Open MPI's ucx and MPIDDP_FAULT_TOLERANT=1 needs ob1: unset one of them"
        )
    if config.local == "nccl" and config.cuda_aware:
        raise ConfigError(
            "MPIDDP_LOCAL=nccl and MPIDDP_CUDA_AWARE=1 together can hang: a kernel of NCCL waits on the GPU for a rank "
            "that waits in MPI for its own GPU. Unset one of them"
        )
    if config.local == "nccl" and config.deterministic:
        raise ConfigError(
            "with MPIDDP_LOCAL=nccl NCCL chooses the order of additions, which MPIDDP_DETERMINISTIC=1 does not allow: "
            "unset one of them"
        )


def before_mpi(config: Config) -> Prepared:
    """Set what Open MPI is to read at start-up, and load UCX if ``config.cuda_aware`` asks for it.

    If MPI runs already nothing is set, and ``lost`` says what that costs and which line to move. Raises
    :class:`ConfigError` where two settings contradict each other.
    """
    _refuse_contradictions(config)
    environ, launch = configuration.environ(), detect(configuration.environ())
    files, is_wheel, cpus = conf_files(environ), mpi_is_wheel(environ), len(processes.usable_cpus())
    settings = choose_settings(config, environ, files, launch, cpus, is_wheel, interfaces())
    running = sys.modules.get("mpi4py.MPI")
    if running is not None and running.Is_initialized():
        return Prepared({}, _what_is_lost(settings, launch, running.get_vendor()[0]))
    chosen = chosen_parameters(environ, files)
    layer = settings.get(_PREFIX + "pml") or chosen.get("pml")
    configuration.export(settings)
    if config.cuda_aware and is_wheel and layer == "ucx":
        load_ucx()
    return Prepared(settings, _what_does_not_reach_all(config, chosen, launch))


def _what_does_not_reach_all(config: Config, chosen: Mapping[str, str], launch: Launch) -> str | None:
    """One line for the user where fault tolerance was asked for, perhaps on the first host alone."""
    if not config.fault_tolerant or settings_reach_all(launch) or not is_open(chosen, "ob1"):
        return None
    if launch.kind in ("mpich", "intel mpi"):
        return None  # it is Open MPI's layer
    return (
        "MPIDDP_FAULT_TOLERANT=1: Open MPI's layer is left as it is, since other hosts may not know of it, and "
        "ranks that differ in it abort: start with `mpirun --mca pml ob1 -x MPIDDP_FAULT_TOLERANT=1`, or `mpiddp run`"
    )


def _what_is_lost(settings: Mapping[str, str], launch: Launch, vendor: str) -> str | None:
    """One line for the user, unless nothing is lost: the settings are Open MPI's, and one node needs no TCP."""
    one_node = launch.is_one_node
    lost = {n: v for n, v in settings.items() if not (one_node and n.startswith(_PREFIX + "btl_tcp_"))}
    if not lost or vendor != "Open MPI":
        return None
    return (
        f"MPI was started before mpiddp.init(), too early for {' '.join(f'{n}={v}' for n, v in sorted(lost.items()))}: "
        "call mpiddp.init() above the line `from mpi4py import MPI`, or set them by `mpirun --mca`"
    )
