"""The distributed optimizer."""

from .distributed import DistributedOptimizer
from .watch import ExchangeReport, watch_exchange

__all__ = ["DistributedOptimizer", "ExchangeReport", "watch_exchange"]
