"""What ``horovod`` and its submodules consist of in a run of ``python -m mpiddp.as_horovod``."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn

from .. import built, elastic, errors, process_set, runtime
from .. import torch as alias
from ..elastic.base import ObjectState, State

__all__ = ["HOROVOD_VERSION", "serve"]

#: The release whose API is served, for libraries that ask.
HOROVOD_VERSION = "0.28.1"


def serve(horovod: ModuleType) -> None:
    """Fill the package ``horovod``, and put its submodules where imports find them."""
    served = {
        f"horovod.torch{name.removeprefix(alias.__name__)}": module
        for name, module in list(sys.modules.items())
        if name == alias.__name__ or name.startswith(f"{alias.__name__}.")
    }
    parts: dict[str, dict[str, Any]] = {
        "exceptions": {
            "HorovodInternalError": errors.CollectiveError,
            "HostsUpdatedInterrupt": elastic.HostsUpdatedInterrupt,
        },
        "util": _inquiries(),
        "process_sets": {
            "ProcessSet": process_set.ProcessSet,
            "global_process_set": process_set.global_process_set,
            "add_process_set": runtime.add_process_set,
            "remove_process_set": runtime.remove_process_set,
        },
        "elastic": {"ObjectState": ObjectState, "State": State},
    }
    package = served["horovod.common"] = ModuleType("horovod.common", "What Horovod's frameworks share.")
    package.__path__ = []
    for name, content in parts.items():
        module = served[f"horovod.common.{name}"] = ModuleType(f"horovod.common.{name}")
        vars(module).update(content)
        setattr(package, name, module)
    vars(horovod).update(torch=alias, common=package, run=_run, __version__=HOROVOD_VERSION)
    sys.modules.update(served)


def _run(*args: Any, **kwargs: Any) -> NoReturn:
    """What ``horovod.run`` is here."""
    raise errors.LaunchError(
        "horovod.run() starts processes itself, which mpiddp leaves to the launcher: start the script with mpirun -n 4 "
        "python -m mpiddp.as_horovod script.py, and call the training function directly"
    )


def _inquiries() -> dict[str, Callable[..., Any]]:
    """What scripts ask of ``horovod.common.util``. Horovod's take ``verbose``, since they try to load an extension."""

    def answering(question: Callable[[], Any]) -> Callable[..., Any]:
        return lambda verbose=False: question()

    questions = (built.mpi_built, built.gloo_built, built.nccl_built, built.ddl_built, built.ccl_built)
    return {
        **{question.__name__: answering(question) for question in questions},
        "extension_available": lambda ext_base_name, verbose=False: ext_base_name == "torch",
        "check_extension": _check_extension,
        "num_rank_is_power_2": lambda num_rank: num_rank > 0 and num_rank & (num_rank - 1) == 0,
        "split_list": _split_list,
    }


def _check_extension(ext_name: str, *_: Any) -> None:
    if ext_name != "horovod.torch":
        raise ImportError(f"{ext_name} is not served: mpiddp is for PyTorch alone")


def _split_list(items: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    """``items`` in so many consecutive parts, the first of them longer by one where it does not divide."""
    length, longer = divmod(len(items), parts)
    starts = [number * length + min(number, longer) for number in range(parts + 1)]
    return [items[lo:hi] for lo, hi in itertools.pairwise(starts)]
