"""The collectives, each in its blocking and its asynchronous form, over one submit function.

All take tensors of any shape, contiguous or not, and every dtype that ``dtypes`` lists; a tensor on another device
than the CPU goes by way of host memory. ``name`` lets ranks submit in different orders; unnamed operations are
matched by their order.
"""

from ..engine import Handle
from ..op import Adasum, Average, Max, Min, Op, Product, Sum
from .empty import empty
from .group import (
    grouped_allgather,
    grouped_allgather_async,
    grouped_allreduce,
    grouped_allreduce_,
    grouped_allreduce_async,
    grouped_allreduce_async_,
    grouped_reducescatter,
    grouped_reducescatter_async,
)
from .move import (
    allgather,
    allgather_async,
    broadcast,
    broadcast_,
    broadcast_async,
    broadcast_async_,
)
from .reduce import all_ranks, allreduce, allreduce_, allreduce_async, allreduce_async_, any_rank
from .scatter import alltoall, alltoall_async, reducescatter, reducescatter_async
from .sparse import sparse_allreduce_async
from .submit import poll, synchronize
from .together import barrier, join

__all__ = [
    "Adasum",
    "Average",
    "Handle",
    "Max",
    "Min",
    "Op",
    "Product",
    "Sum",
    "all_ranks",
    "allgather",
    "allgather_async",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "alltoall",
    "alltoall_async",
    "any_rank",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "empty",
    "grouped_allgather",
    "grouped_allgather_async",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "grouped_reducescatter",
    "grouped_reducescatter_async",
    "join",
    "poll",
    "reducescatter",
    "reducescatter_async",
    "sparse_allreduce_async",
    "synchronize",
]
