"""``mpiddp run``: its arguments, and the one step from them to the launcher."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ... import binding, config, launch, processes
from ..command import Command
from .command import Job, Machine, command_line
from .launchers import find

__all__ = ["COMMAND"]

_DESCRIPTION = """\
Start a program on several ranks: a thin front to mpirun, mpiexec or srun.

    mpiddp run -np 8 python train.py --epochs 90
    mpiddp run -np 8 -H node1:4,node2:4 python train.py
    mpiddp run -np 2 --dry-run train.py

It chooses the binding (the cores of this machine are shared out among the ranks; on other hosts say --cpus-per-rank),
lets ranks give way to each other where there are more of them than cores, hands MPIDDP_* and OMP_NUM_THREADS to every
host, sets what Open MPI's TCP needs, lets its wheel take GPUs' memory where libucx is installed and all ranks are here,
and allows root. The command is printed, and takes the place of this process: its exit code is the launcher's. What
mpirun can do beyond that, do with mpirun.
"""


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-np", "-n", type=int, required=True, metavar="N", dest="ranks", help="the number of ranks")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("-H", "--host", "--hosts", default="", dest="hosts", help="hosts and their slots: a:4,b:4")
    where.add_argument("--hostfile", default="", metavar="FILE", help="a file of hosts, as the launcher wants it")
    parser.add_argument("--cpus-per-rank", type=int, metavar="N", dest="cpus", help="cores that each rank is bound to")
    parser.add_argument(
        "-x", action="append", default=[], metavar="NAME[=VALUE]", dest="passed", help="a variable for all ranks"
    )
    parser.add_argument("--launcher", choices=["auto", "mpirun", "srun"], default="auto")
    parser.add_argument("--mpi", default="pmix", help="srun's --mpi (default pmix; pmi2 for MPICH)")
    parser.add_argument(
        "--launcher-args",
        default="",
        metavar="WORDS",
        help="more words for the launcher, in one argument: --launcher-args='--tag-output'",
    )
    parser.add_argument("--dry-run", action="store_true", help="only print the command")
    parser.add_argument("program", nargs=argparse.REMAINDER, metavar="PROGRAM ...", help="python train.py, say")


def _run(args: argparse.Namespace) -> int:
    environ = config.environ()
    started = launch.detect(environ)
    if started.kind != "none" and not launch.is_interactive(started, environ, ()):
        args.error(f"this is a rank already (started by {started.kind}): mpiddp run is what starts the ranks")
    if args.ranks < 1 or (args.cpus is not None and args.cpus < 1):
        args.error(f"-np {args.ranks} and --cpus-per-rank must be at least 1")
    program = _program([word for at, word in enumerate(args.program) if at or word != "--"])
    if not program:
        args.error("no program: mpiddp run -np 2 python train.py")
    launcher = find(args.launcher, environ, Path(sys.prefix))
    if isinstance(launcher, str):
        return int(args.error(launcher))
    if launcher.kind == "slurm" and args.hostfile:
        args.error("srun takes no --hostfile: it starts ranks on the nodes of its job; give -H to choose among them")
    job = Job(
        args.ranks,
        program,
        args.hosts,
        args.hostfile,
        args.cpus,
        args.passed,
        shlex.split(args.launcher_args),
        args.mpi,
    )
    usable = processes.usable_cpus()
    machine = Machine(
        binding.cores(usable),
        os.geteuid() == 0,
        environ,
        _has_cuda_wheels(environ),
        launch.chosen_parameters(environ, launch.conf_files(environ)),
        binding.cpus_per_core(usable),
    )
    try:
        words = command_line(launcher, job, machine)
    except ValueError as error:
        return int(args.error(str(error)))
    print(shlex.join(words), file=sys.stdout if args.dry_run else sys.stderr, flush=True)
    if not args.dry_run:
        os.execv(words[0], words)
    return 0


def _has_cuda_wheels(environ: Mapping[str, str]) -> bool:
    """Whether this host has a GPU, and this Python the wheels of Open MPI and of a UCX that takes its memory."""
    has_gpu, has_ucx = Path("/dev/nvidiactl").exists(), importlib.util.find_spec("libucx") is not None
    return has_gpu and has_ucx and launch.mpi_is_wheel(environ)


def _program(words: Sequence[str]) -> list[str]:
    """The program by its absolute path: on other hosts PATH is another, and mpirun may hang for one that it lacks."""
    if words and words[0].endswith(".py"):
        words = [sys.executable, *words]
    found = shutil.which(words[0]) if words else None
    # Not resolved: the python of a virtual environment is a link that tells it where it lies.
    return [str(Path(found).absolute()), *words[1:]] if found else list(words)


COMMAND = Command("run", "start a program on several ranks, by mpirun or srun", _DESCRIPTION, _configure, _run)
