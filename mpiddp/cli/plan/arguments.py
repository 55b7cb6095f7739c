"""The arguments of ``mpiddp plan``."""

from __future__ import annotations

import argparse
import decimal
from pathlib import Path

from ..bench.models import MODELS
from ..command import Command, parse_positive

__all__ = ["COMMAND", "parse_count", "parse_nodes"]

_DESCRIPTION = """\
Measures latency and bandwidth between the nodes that it is started on, and says what gradients' exchange and training
steps would take on more nodes of the same kind, with as many ranks on each (Hockney's model; docs/performance.md).
Two nodes are enough; start as many ranks on each as training has.

  mpirun --host a:4,b:4 mpiddp plan --parameters 350M --step-ms 420
  mpirun --host a:4,b:4 mpiddp plan --model mlp --nodes 2,8,32 --csv plan.csv
"""

_DEFAULT_NODES = [1, 2, 4, 8, 16, 32]
_DTYPES = ("float32", "float64", "bfloat16", "float16")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def parse_count(text: str) -> int:
    """``25M`` as 25,000,000: K, M and B are thousands, millions, billions. Raises ArgumentTypeError for others."""
    unit = text.strip()[-1:].upper()
    unit = unit if unit in _UNITS else ""
    try:
        value = decimal.Decimal(text.strip()[: -1 if unit else None]) * _UNITS[unit]  # as a float 4.1M is no integer
    except decimal.InvalidOperation:
        value = decimal.Decimal(0)
    value = value if value.is_finite() else decimal.Decimal(0)
    if not 1 <= value < 10**15 or value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of parameters; write 25000000, 25M or 1.3B")
    return int(value)


def parse_nodes(text: str) -> list[int]:
    """``2,4,8``. Raises ArgumentTypeError for anything else."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers of nodes; write 2,4,8")
    return found


def _configure(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--parameters", type=parse_count, metavar="N", help="so many are trained, such as 25M")
    what.add_argument(
        "--model", choices=MODELS, help="one of bench's models, whose step is timed here (the default: mlp)"
    )
    parser.add_argument("--step-ms", type=parse_positive, metavar="MS", help="of a step without any exchange")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="of gradients (default float32)")
    parser.add_argument(
        "--nodes", type=parse_nodes, default=_DEFAULT_NODES, metavar="LIST", help="default 1,2,4,8,16,32"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows to FILE, too")


def _run(arguments: argparse.Namespace) -> int:
    from . import predict

    return predict.run(arguments)


COMMAND = Command("plan", "predict step times on more nodes from this network", _DESCRIPTION, _configure, _run)
