"""How a slice of a flat buffer reaches a peer."""

from .base import Link, Pending, Region, Steps, drain
from .node import Node

__all__ = ["Link", "Node", "Pending", "Region", "Steps", "drain"]
