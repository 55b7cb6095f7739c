"""``mpiddp bench``: what all-reduces, training steps and memory cost on this machine, beside others in the same run.

arguments.py reads the command line and chooses between reduce.py, gpu.py (all-reduces of tensors on GPUs), train.py and
memory.py; place.py says where it runs; timing.py is the one way in which anything is timed.
"""

from __future__ import annotations

from .arguments import COMMAND

__all__ = ["COMMAND"]
