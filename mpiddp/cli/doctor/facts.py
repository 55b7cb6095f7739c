"""The facts: plain data, gathered from all ranks, that the checks look at."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...binding import NodeFacts
from ...gpus import Placement, Seen
from ...launch import Launch
from ...transport.probe import Answer
from .machine import Machine

__all__ = ["Facts", "Job", "Pair", "plain"]


@dataclasses.dataclass(frozen=True)
class Facts:
    """One rank's. Texts are empty where there is nothing to tell; ``node`` numbers the nodes, by MPI's answer.

    ``tcp_included`` and ``tcp_excluded`` are the interfaces that somebody has chosen for MPI's TCP.
    """

    rank: int
    size: int
    host: str
    machine: Machine
    launch: Launch
    cpus: NodeFacts
    versions: dict[str, str]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    ignored_horovod: tuple[str, ...] = ()
    config_problem: str = ""
    mpi_problem: str = ""
    size_problem: str = ""
    init_problem: str = ""
    node: int = 0
    local_rank: int = 0
    library: str = ""
    libmpi: str = ""
    launcher_exe: str = ""
    thread_level: str = ""
    pml: str = ""
    has_ucx_ib: bool = False
    tcp_included: str = ""
    tcp_excluded: str = ""
    memory: str = ""
    gpu: Placement = dataclasses.field(default_factory=lambda: Placement(None, Seen()))
    cuda_aware: Answer = dataclasses.field(default_factory=lambda: Answer(False, ""))

    @property
    def problem(self) -> str:
        """What keeps this rank from training at all; the first of several."""
        return self.config_problem or self.mpi_problem or self.size_problem or self.init_problem


@dataclasses.dataclass(frozen=True)
class Pair:
    """How two ranks exchange: ``way`` in words, GB/s in each direction when both send (None: not measured).

    ``gpu_gigabytes_per_s``: from GPU to GPU, by the way that ``way`` names.
    """

    ranks: tuple[int, int]
    way: str
    gigabytes_per_s: float | None = None
    latency_us: float | None = None
    gpu_gigabytes_per_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """All ranks' facts in their order, and what was found between them.

    ``stuck_in``: what nobody answered in, when the time was up; the facts are then this rank's alone.
    """

    ranks: tuple[Facts, ...]
    pairs: tuple[Pair, ...] = ()
    stuck_in: str = ""
    waited_s: float = 0.0

    @property
    def is_open_mpi(self) -> bool:
        """Whether its MPI is Open MPI, or may be, before MPI has said what it is."""
        first = self.ranks[0]
        if first.library:
            return "open mpi" in first.library.lower()
        return first.launch.kind not in ("mpich", "intel mpi")

    def nodes(self) -> dict[int, list[Facts]]:
        """The ranks of each node, by the node's number."""
        found: dict[int, list[Facts]] = {}
        for each in self.ranks:
            found.setdefault(each.node, []).append(each)
        return found


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
