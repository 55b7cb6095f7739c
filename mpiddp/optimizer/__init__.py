"""The distributed optimizer."""

from .distributed import DistributedOptimizer

__all__ = ["DistributedOptimizer"]
