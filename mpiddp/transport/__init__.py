"""How a slice of a flat buffer reaches a peer."""

from .base import Link, Pending, Region, Steps, drain

__all__ = ["Link", "Pending", "Region", "Steps", "drain"]
