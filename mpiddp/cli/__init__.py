"""The command line: ``mpiddp COMMAND``, or ``python -m mpiddp COMMAND``.

A command is a module or a package in here with a ``COMMAND`` (:class:`.command.Command`); a new file is a new command.
Nothing in the library imports this package.
"""

from __future__ import annotations

from .main import main

__all__ = ["main"]
