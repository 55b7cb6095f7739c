"""``import mpiddp.torch as hvd``: everything that ``mpiddp`` has, and submodules with the names that Horovod's have."""

from __future__ import annotations

import sys
from importlib import import_module

from .. import *  # noqa: F403 - this is what an alias is
from .. import __all__ as __all__

#: Each is a module of mpiddp itself, the same object under another name.
_SUBMODULES = (
    "compression",
    "elastic",
    "elastic.sampler",
    "elastic.state",
    "functions",
    "optimizer",
    "sync_batch_norm",
)

for _name in _SUBMODULES:
    sys.modules[f"{__name__}.{_name}"] = import_module(f"mpiddp.{_name}")
    if "." not in _name:
        globals()[_name] = sys.modules[f"{__name__}.{_name}"]

#: The operations with init(), rank() and their kin, which Horovod has in one module: all of this one.
mpi_ops = sys.modules[f"{__name__}.mpi_ops"] = sys.modules[__name__]
