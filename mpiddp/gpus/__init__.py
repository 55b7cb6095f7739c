"""Which GPUs this rank sees, and which of them is its own.

Told by UUID over all ranks of the node, because numbers mean something else in each process: under
``CUDA_VISIBLE_DEVICES``, or where the launcher gives each rank a GPU of its own, everybody's is number 0. Nothing here
makes a CUDA context, on any GPU.
"""

from __future__ import annotations

from .choose import choose, sharing
from .placement import Placement, place
from .visible import Gpu, Inquiry, Seen, ask

__all__ = ["Gpu", "Inquiry", "Placement", "Seen", "ask", "choose", "place", "sharing"]
