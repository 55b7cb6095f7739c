"""Finds the commands, reads the arguments, runs the one that is asked for."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path

from ..version import __version__
from .command import Command, Parser

__all__ = ["commands", "main", "parser"]


def commands() -> list[Command]:
    """Those of the modules beside this one, by name."""
    modules = [
        importlib.import_module(f"{__package__}.{info.name}")
        for info in pkgutil.iter_modules([str(Path(__file__).parent)])
    ]
    found = [module.COMMAND for module in modules if isinstance(getattr(module, "COMMAND", None), Command)]
    return sorted(found, key=lambda command: command.name)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; ``run`` in what it returns is the command's function."""
    top = Parser(prog="mpiddp", description="Data-parallel PyTorch training over MPI: tools.")
    top.add_argument("--version", action="version", version=f"mpiddp {__version__}")
    below = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for command in commands():
        added = below.add_parser(
            command.name,
            help=command.summary,
            description=command.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.configure(added)
        added.set_defaults(run=command.run, error=added.error)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, this process's own unless given; returns the exit code. Ends with 2 for a wrong one."""
    parsed = parser().parse_args(arguments)
    return int(parsed.run(parsed))
