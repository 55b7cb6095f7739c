"""What a command is, and how one speaks: every rank runs the command, one of them writes."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, NoReturn

from .. import config, launch

__all__ = ["Command", "Parser", "is_first_rank", "parse_positive"]


@dataclass(frozen=True)
class Command:
    """``configure`` adds the command's arguments to its parser; ``run`` does the work and returns the exit code."""

    name: str
    summary: str
    description: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def is_first_rank() -> bool:
    """Whether this process is rank 0, or no rank at all, as far as the launcher's variables tell. Needs no MPI."""
    return launch.detect(config.environ()).rank in (None, 0)


def parse_positive(text: str) -> float:
    """An argument that is a finite number above 0. Raises ArgumentTypeError for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help and errors come from rank 0 alone; the others end with the same code in silence.

    It takes no abbreviations: a program's own ``--s`` would be one of several options here, and so an error.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def print_help(self, file: IO[str] | None = None) -> None:  # type: ignore[override]
        """As the base class's, on rank 0."""
        if is_first_rank():
            super().print_help(file)

    def print_usage(self, file: IO[str] | None = None) -> None:  # type: ignore[override]
        """As the base class's, on rank 0."""
        if is_first_rank():
            super().print_usage(file)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End with ``status``; rank 0 says why."""
        if message and is_first_rank():
            sys.stderr.write(message)
        sys.exit(status)
