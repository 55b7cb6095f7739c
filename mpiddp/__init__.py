"""Data-parallel PyTorch training over MPI.

Start it with ``mpirun -np 8 python train.py``; the names are those of Horovod's PyTorch API. See README.md.
"""

from __future__ import annotations

from .errors import (
    CollectiveError,
    ConfigError,
    DuplicateNameError,
    LaunchError,
    MismatchError,
    MpiddpError,
    NotInitializedError,
    RankLeftError,
    StallError,
    WorkerProcessError,
)
from .functions import allgather_object, broadcast_object, broadcast_optimizer_state, broadcast_parameters
from .metrics import mean
from .ops import (
    Average,
    Max,
    Min,
    Product,
    Sum,
    allgather,
    allgather_async,
    allreduce,
    allreduce_,
    allreduce_async,
    allreduce_async_,
    barrier,
    broadcast,
    broadcast_,
    broadcast_async,
    broadcast_async_,
    poll,
    synchronize,
)
from .optimizer import DistributedOptimizer
from .runtime import (
    cross_rank,
    cross_size,
    init,
    is_homogeneous,
    is_initialized,
    local_rank,
    local_size,
    rank,
    shutdown,
    size,
)
from .sampler import ShardSampler
from .version import __version__

__all__ = [
    "Average",
    "CollectiveError",
    "ConfigError",
    "DistributedOptimizer",
    "DuplicateNameError",
    "LaunchError",
    "Max",
    "Min",
    "MismatchError",
    "MpiddpError",
    "NotInitializedError",
    "Product",
    "RankLeftError",
    "ShardSampler",
    "StallError",
    "Sum",
    "WorkerProcessError",
    "__version__",
    "allgather",
    "allgather_async",
    "allgather_object",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "cross_rank",
    "cross_size",
    "init",
    "is_homogeneous",
    "is_initialized",
    "local_rank",
    "local_size",
    "mean",
    "poll",
    "rank",
    "shutdown",
    "size",
    "synchronize",
]
