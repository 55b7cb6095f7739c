"""Memory that the ranks of a node share."""

from .node import NodeMemory
from .segments import Segments

__all__ = ["NodeMemory", "Segments"]
