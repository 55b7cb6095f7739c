"""``mpiddp slurm``: print a batch script for Slurm."""

from __future__ import annotations

import argparse
import re
import shlex
import sys

from .. import config
from .command import Command

__all__ = ["COMMAND", "script"]

_DESCRIPTION = """\
Print a batch script for Slurm that starts a program on every rank. Look at it, change it, submit it:

    mpiddp slurm --nodes 2 --ranks-per-node 4 --cpus-per-rank 8 --gpus-per-node 4 --time 12:00:00 --requeue \\
        python train.py --resume > train.sbatch
    sbatch train.sbatch

With --signal the job is told of its end so many seconds early; a script that asks mpiddp.checkpoint.Checkpoints for
preempted() then leaves with a checkpoint, and with --requeue the job goes back into the queue and goes on from there.

With --array each task is a job of its own and needs a directory of its own, for checkpoints too. $SLURM_ARRAY_TASK_ID
and other names of the job ($SLURM_ARRAY_..., $SLURM_JOB_..., $SLURM_SUBMIT_...) in single quotes are filled in when
it runs:

    mpiddp slurm --array 0-9 python train.py --checkpoint 'run-$SLURM_ARRAY_TASK_ID' > train.sbatch
"""

#: mpirun ends the job at other signals instead of handing them on.
_PASSED_ON = ("USR1", "USR2")

#: What is equal in all tasks of the job. $SLURM_PROCID and the like are not: the program's own shell fills them in.
_OF_THE_JOB = r"\$(?=\{?SLURM_(?:ARRAY|JOB|SUBMIT)_)"


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=1, metavar="N")
    parser.add_argument("--ranks-per-node", type=int, metavar="N", help="default: one a GPU, else one")
    parser.add_argument("--cpus-per-rank", type=int, default=1, metavar="N")
    parser.add_argument("--gpus-per-node", type=int, default=0, metavar="N")
    parser.add_argument("--time", default="01:00:00", metavar="LIMIT", help="as sbatch's (default one hour)")
    parser.add_argument(
        "--signal", default="USR1", metavar="NAME", help="announces the end (default USR1); '' for none"
    )
    parser.add_argument("--seconds-before", type=int, default=120, metavar="S", help="so early (default 120)")
    parser.add_argument("--requeue", action="store_true", help="the job puts itself back into the queue at the signal")
    parser.add_argument("--array", default="", metavar="TASKS", help="as sbatch's; a directory for each task")
    parser.add_argument("--job-name", default="", metavar="NAME")
    parser.add_argument("--sbatch", action="append", default=[], metavar="WORD", help="one more option: partition=gpu")
    parser.add_argument("--module", action="append", default=[], metavar="NAME", help="a module to load")
    parser.add_argument(
        "--launcher", choices=["srun", "mpirun"], default="srun", help="default srun; mpirun is Open MPI's here"
    )
    parser.add_argument("--mpi", default="pmix", help="srun's --mpi (default pmix; pmi2 for MPICH)")
    parser.add_argument("program", nargs=argparse.REMAINDER, metavar="PROGRAM ...", help="python train.py, say")


def _run(args: argparse.Namespace) -> int:
    args.program = [word for at, word in enumerate(args.program) if at or word != "--"]
    if args.program and args.program[0].endswith(".py"):
        args.program.insert(0, "python")  # as mpiddp run takes it
    try:
        args.signal = config.parse_signals(args.signal)
    except ValueError as error:
        args.error(f"--signal {args.signal}: {error}")
    if "," in args.signal:
        args.error(f"--signal {args.signal}: Slurm sends one")
    if not args.program:
        args.error("no program: mpiddp slurm --nodes 2 python train.py")
    counts = (
        args.nodes,
        args.cpus_per_rank,
        args.seconds_before,
        1 if args.ranks_per_node is None else args.ranks_per_node,
    )
    if min(counts) < 1 or args.gpus_per_node < 0:
        args.error("nodes, ranks, CPUs and seconds must be at least 1")
    if args.launcher == "mpirun" and args.signal and args.signal not in _PASSED_ON:
        args.error(
            f"mpirun ends the job at SIG{args.signal}; it hands on only {' and '.join(_PASSED_ON)}: --signal USR1"
        )
    if args.requeue and not args.signal:
        args.error("--requeue needs a --signal, at which the job puts itself back into the queue")
    sys.stdout.write(script(args))
    return 0


def script(args: argparse.Namespace) -> str:
    """The whole script."""
    lines = ["#!/bin/bash", *(f"#SBATCH --{_quoted(word)}" for word in _options(args)), "", "set -euo pipefail"]
    lines += [f"module load {shlex.quote(name)}" for name in args.module]
    lines += [
        "",
        "# One thread of torch for each CPU of the rank; without this each rank starts one for each core of the node.",
        "export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK",
    ]
    settings = {"MPIDDP_PREEMPT_SIGNAL": args.signal, "MPIDDP_REQUEUE": str(int(args.requeue))} if args.signal else {}
    lines += [f"export {name}={value}" for name, value in settings.items()]
    start = _srun(args) if args.launcher == "srun" else _mpirun(args, ["OMP_NUM_THREADS", *settings])
    return "\n".join([*lines, "", *start, ""])


def _options(args: argparse.Namespace) -> list[str]:
    ranks = args.ranks_per_node or args.gpus_per_node or 1
    name = args.job_name or next(
        (w.rpartition("/")[2].removesuffix(".py") for w in args.program if w.endswith(".py")), ""
    )
    options = [f"job-name={name}"] if name else []
    options += [f"nodes={args.nodes}", f"ntasks-per-node={ranks}", f"cpus-per-task={args.cpus_per_rank}"]
    # Each rank sees all GPUs of its node, which they need in order to exchange directly.
    options += [f"gpus-per-node={args.gpus_per_node}"] if args.gpus_per_node else []
    options += [f"time={args.time}"]
    if args.signal:
        # srun: Slurm signals the ranks. mpirun: they are no tasks of Slurm's, so it signals this shell (B:).
        options.append(f"signal={'B:' if args.launcher == 'mpirun' else ''}{args.signal}@{args.seconds_before}")
    options.append("requeue" if args.requeue else "no-requeue")
    options += [f"array={args.array}"] if args.array else []
    options += [f"output=%x-{'%A_%a' if args.array else '%j'}.out", "open-mode=append"]
    return options + [word.removeprefix("--") for word in args.sbatch]


def _quoted(option: str) -> str:
    """``job-name=my job`` with its value in quotes, unless it needs none or has them."""
    name, equals, value = option.partition("=")
    if not re.search(r"[\s#]", value) or re.fullmatch(r"""(["']).*\1""", value):
        return option
    return f"{name}{equals}" + '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def _program(args: argparse.Namespace) -> str:
    return " ".join(_word(word) for word in args.program)


def _word(word: str) -> str:
    """One word for the shell, in which the job's variables alone stay variables."""
    parts = re.split(_OF_THE_JOB, word)
    if len(parts) == 1:
        return shlex.quote(word)
    return '"' + "$".join(re.sub(r'(["\\$`])', r"\\\1", part) for part in parts) + '"'


def _srun(args: argparse.Namespace) -> list[str]:
    return [
        "# --cpus-per-task stands here again because srun does not take it over from sbatch (Slurm 22.05 and newer).",
        f'srun --mpi={args.mpi} --cpus-per-task="$SLURM_CPUS_PER_TASK" --cpu-bind=cores \\',
        f"    {_program(args)}",
    ]


def _mpirun(args: argparse.Namespace, variables: list[str]) -> list[str]:
    passed = " ".join(f"-x {name}" for name in variables)
    start = [
        "# mpirun takes the nodes and the number of ranks from Slurm.",
        "# Its CPUs are hyperthreads where there are any, which mpirun then counts, too.",
        f'mpirun --use-hwthread-cpus --map-by "slot:PE=$SLURM_CPUS_PER_TASK" --bind-to hwthread {passed} \\',
        f"    {_program(args)}",
    ]
    if not args.signal:
        return start
    start[-1] += " &"
    return [
        "# Slurm signals this shell alone, and mpirun hands the signal on to the ranks. It also interrupts `wait`,",
        "# which is then called again; 127 says that what it told before was the end.",
        "launcher= status=",
        f"""trap 'signalled=yes; kill -{args.signal} "$launcher" || true' {args.signal}""",
        *start,
        "launcher=$!",
        "while true; do",
        "    signalled=",
        '    wait "$launcher" && told=0 || told=$?',
        "    if [[ $told != 127 || ! $status ]]; then status=$told; fi",
        "    [[ $signalled ]] || break",
        "done",
        'exit "$status"',
    ]


COMMAND = Command("slurm", "print a batch script for Slurm", _DESCRIPTION, _configure, _run)
