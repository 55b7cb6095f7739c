"""The arguments of ``mpiddp bench``, and which of its three modes they ask for."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ...dtypes import BY_NAME
from ..command import Command, parse_positive
from .contenders import PEERS
from .models import MODELS, OPTIMIZERS, VARIANTS_OF_MEMORY
from .sizes import DEFAULT_SIZES, parse_size

__all__ = ["COMMAND"]

_DESCRIPTION = """\
Measures all-reduces (or with --train whole training steps, with --memory what they need) on the ranks that it is
started with, beside others in the same run. Run it on machines that do nothing else.

  mpirun -np 2 --bind-to core mpiddp bench --csv table.csv --plot table.png
  mpirun -np 2 --bind-to core mpiddp bench --train
  mpirun -np 2 --bind-to core mpiddp bench --memory mpiddp
  mpirun -np 2 mpiddp bench --device cuda --peers gloo
"""


def _sizes(text: str) -> list[int]:
    try:
        return [parse_size(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _names(text: str, known: tuple[str, ...], what: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: no such {what}; there are {', '.join(known)}")
    return names


def _dtype(text: str) -> torch.dtype:
    found = BY_NAME.get(text)
    if found is None or found is torch.bool:
        known = ", ".join(sorted(name for name, dtype in BY_NAME.items() if dtype is not torch.bool))
        raise argparse.ArgumentTypeError(f"{text!r} is no dtype that can be added; there are {known}")
    return found


def _count(text: str) -> int:
    value = parse_positive(text)
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)


def _configure(parser: argparse.ArgumentParser) -> None:
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--train", action="store_true", help="time training steps")
    mode.add_argument(
        "--memory", choices=VARIANTS_OF_MEMORY, help="a training step's memory above a local one's; one kind a run"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows to FILE, too")
    parser.add_argument("--rounds", type=_count, help="at the most so many timed rounds for each size or model")
    parser.add_argument("--seconds", type=parse_positive, help="no new round after this time for one size or model")
    parser.add_argument(
        "--peers",
        type=lambda text: _names(text, PEERS, "peer"),
        default=list(PEERS),
        metavar="LIST",
        help=f"whom to compare with: {','.join(PEERS)} (the default), fewer, or '' for none",
    )
    sums = parser.add_argument_group("all-reduces")
    sums.add_argument("--sizes", type=_sizes, default=list(DEFAULT_SIZES), help="bytes, such as 4,4K,100M")
    sums.add_argument("--dtype", type=_dtype, default=torch.float32, help="by torch's name (default float32)")
    sums.add_argument("--warm", action="store_true", help="leave large tensors in the caches before a call, too")
    sums.add_argument("--plot", type=Path, metavar="FILE", help="draw the table; needs the extra plot")
    sums.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where tensors lie (default cpu)")
    steps = parser.add_argument_group("training steps and memory")
    steps.add_argument(
        "--models",
        type=lambda text: _names(text, tuple(MODELS), "model"),
        metavar="LIST",
        help=f"some of {','.join(MODELS)} (default: all; --memory takes one, by default mlp)",
    )
    steps.add_argument(
        "--optimizers",
        type=lambda text: _names(text, OPTIMIZERS, "optimizer"),
        metavar="LIST",
        help=f"some of {','.join(OPTIMIZERS)} (default: all; --memory takes one, by default sgd)",
    )
    steps.add_argument("--width", type=_count, default=2048, help="of the mlp; the gpt has an eighth (default 2048)")
    steps.add_argument("--batch-size", type=_count, help="samples a rank (default: the model's own)")


def _run(arguments: argparse.Namespace) -> int:
    from . import gpu, memory, reduce, train

    if (arguments.train or arguments.memory) and arguments.plot:
        arguments.error("--plot draws all-reduces: leave it out, or --train and --memory")
    if (arguments.train or arguments.memory) and arguments.device != "cpu":
        arguments.error("--device cuda measures all-reduces: leave it out, or --train and --memory")
    if arguments.memory:
        for name in ("models", "optimizers"):
            if len(getattr(arguments, name) or [""]) > 1:
                arguments.error(
                    f"--memory takes one of --{name}: what the first leaves behind would count for the next"
                )
        return memory.run(arguments)
    if arguments.train:
        return train.run(arguments)
    return gpu.run(arguments) if arguments.device == "cuda" else reduce.run(arguments)


COMMAND = Command(
    "bench",
    "measure all-reduces, training steps and memory on these ranks, beside others",
    _DESCRIPTION,
    _configure,
    _run,
)
