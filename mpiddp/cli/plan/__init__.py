"""``mpiddp plan``: what all-reduces and training steps would take on more nodes, by what is measured on these.

arguments.py reads the command line; measure.py measures the network, the memory and the addition; model.py has the
formulas, pure; predict.py makes the table.
"""

from __future__ import annotations

from .arguments import COMMAND

__all__ = ["COMMAND"]
