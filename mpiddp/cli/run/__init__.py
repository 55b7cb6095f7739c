"""``mpiddp run``: mpirun, mpiexec or srun with the settings that this library wants. It prints the command it runs."""

from __future__ import annotations

from .arguments import COMMAND

__all__ = ["COMMAND"]
