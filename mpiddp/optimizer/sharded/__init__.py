"""The sharded update: each rank keeps the optimizer's state of, and updates, one part of the parameters.

ZeRO stage 1: S. Rajbhandari, J. Rasley, O. Ruwase and Y. He, ZeRO: memory optimizations toward training trillion
parameter models, SC 2020. Gradients are reduced by a reduce-scatter (n(p-1)/p elements a rank), and the new parameters
reach all ranks by an all-gather (as many): the bytes of one all-reduce, with 1/p of the update's work and state.
"""

from .optimizer import wrap_sharded
from .support import check_shardable

__all__ = ["check_shardable", "wrap_sharded"]
