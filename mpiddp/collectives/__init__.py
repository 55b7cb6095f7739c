"""The collective algorithms, one a file, over flat 1-D tensors and a link.

Each public function allocates what it needs and returns the exchange as a generator that yields while it waits. ``tag``
separates exchanges that are under way at once.
"""

from .base import ReduceOp, chunk_bounds

__all__ = ["ReduceOp", "chunk_bounds"]
