"""What must be decided before MPI starts, and what must be tidied up right after: ``init()`` calls these in this order.

:func:`detect` reads what the launcher says; :func:`before_mpi` sets what Open MPI reads at start-up; then MPI starts;
:func:`check_size` compares; :func:`first_words` bounds the first exchange; :func:`foreign_launcher` looks for two MPI
installations in one job; :func:`after_mpi` takes the launcher's variables out of the environment that child processes
inherit. Nothing in here imports MPI or torch.
"""

from __future__ import annotations

from .check import check_size, is_interactive
from .deadline import first_words, name_network
from .detect import Launch, detect
from .environment import after_mpi, joins
from .foreign import foreign_launcher, foreign_launcher_here
from .interfaces import Interface, interfaces
from .settings import TCP, Prepared, before_mpi, choose_settings, chosen_parameters, conf_files, is_open
from .ucx import MPIRUN_FLAGS, UCX, mpi_is_wheel

__all__ = [
    "MPIRUN_FLAGS",
    "TCP",
    "UCX",
    "Interface",
    "Launch",
    "Prepared",
    "after_mpi",
    "before_mpi",
    "check_size",
    "choose_settings",
    "chosen_parameters",
    "conf_files",
    "detect",
    "first_words",
    "foreign_launcher",
    "foreign_launcher_here",
    "interfaces",
    "is_interactive",
    "is_open",
    "joins",
    "mpi_is_wheel",
    "name_network",
]
