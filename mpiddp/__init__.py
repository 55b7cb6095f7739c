"""Data-parallel PyTorch training over MPI.

Start it with ``mpirun -np 8 python train.py``; the names are those of Horovod's PyTorch API. See README.md.
"""

# The public names are those in the ``__all__`` of the modules below.
# ruff: noqa: F403, F405

from __future__ import annotations

from . import built, checkpoint, elastic, errors, functions, ops
from .built import *
from .compression import Compression
from .device import local_device
from .errors import *
from .functions import *
from .metrics import mean
from .ops import *
from .optimizer import DistributedOptimizer, watch_exchange
from .process_set import ProcessSet, global_process_set
from .recording import start_timeline, stop_timeline
from .runtime import (
    add_process_set,
    cross_rank,
    cross_size,
    init,
    is_homogeneous,
    is_initialized,
    local_rank,
    local_size,
    rank,
    remove_process_set,
    shutdown,
    size,
)
from .sampler import ShardSampler
from .sync_batch_norm import SyncBatchNorm
from .version import __version__

HorovodInternalError = CollectiveError

__all__ = [
    *built.__all__,
    *errors.__all__,
    *functions.__all__,
    *ops.__all__,
    "Compression",
    "DistributedOptimizer",
    "HorovodInternalError",
    "ProcessSet",
    "ShardSampler",
    "SyncBatchNorm",
    "__version__",
    "add_process_set",
    "checkpoint",
    "cross_rank",
    "cross_size",
    "elastic",
    "global_process_set",
    "init",
    "is_homogeneous",
    "is_initialized",
    "local_device",
    "local_rank",
    "local_size",
    "mean",
    "rank",
    "remove_process_set",
    "shutdown",
    "size",
    "start_timeline",
    "stop_timeline",
    "watch_exchange",
]
