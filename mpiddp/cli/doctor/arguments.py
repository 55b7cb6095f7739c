"""The arguments of ``mpiddp doctor``, and its course."""

from __future__ import annotations

import argparse
import sys

from ... import config
from ..command import Command, is_first_rank, parse_positive
from .checks import findings
from .examine import examine, look_alone, wait_for_all
from .facts import Job
from .finding import exit_code
from .report import as_json, as_text
from .watch import Watch

__all__ = ["COMMAND"]

_DESCRIPTION = """\
Looks at MPI, the launcher, cores, memory, networks and GPUs as a job finds them, and says what is wrong and what to do.
Start it exactly as the training job is started; alone it looks at this machine.

  mpiddp doctor
  mpirun -np 8 --hostfile hosts --map-by slot:PE=4 --bind-to core mpiddp doctor

Exit code: 0 nothing or notes, 1 warnings, 2 errors (2 for wrong arguments, too).
"""

_TIMEOUT_S = 120.0


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="write facts and findings as JSON")
    parser.add_argument("--no-measure", action="store_true", help="leave out the bandwidth between ranks")
    parser.add_argument(
        "--timeout", type=parse_positive, default=_TIMEOUT_S, metavar="S", help="give up after S seconds (default 120)"
    )


def _run(arguments: argparse.Namespace) -> int:
    # What init() would say is among the findings; only what a user wants to see of it comes beside them.
    config.export({"MPIDDP_LOG_LEVEL": config.environ().get("MPIDDP_LOG_LEVEL", "ERROR")})
    speaks = is_first_rank()  # now: MPI's start takes away what it is told by
    alone = look_alone()

    def give_up(watch: Watch) -> None:
        _write(Job((watch.known,), (), watch.phase, watch.timeout_s), arguments.json, speaks)

    watch = Watch(arguments.timeout, alone, give_up)
    job, own = examine(watch, alone, not arguments.no_measure)
    code = _write(job, arguments.json, own.rank == 0 if own.size > 1 else speaks)
    if own.size > 1:
        wait_for_all()  # an exit code other than 0 may make the launcher kill who has not finished writing
    watch.stop()
    return code


def _write(job: Job, is_json: bool, speaks: bool) -> int:
    found = findings(job)
    if speaks:
        sys.stdout.write((as_json if is_json else as_text)(job, found) + "\n")
        sys.stdout.flush()
    return exit_code(found)


COMMAND = Command("doctor", "say what is wrong with MPI, the network and the GPUs here", _DESCRIPTION, _configure, _run)
