"""Python runs this when it starts, in a run of ``python -m mpiddp.as_horovod`` and in that run's child processes.

It answers imports of ``horovod`` with mpiddp, which is not loaded before; then it runs the ``sitecustomize`` that it
stands in front of. A child may be another Python than ours, so there is nothing here but the standard library.
"""

from __future__ import annotations

# pathlib is not loaded for every child process.
# ruff: noqa: PTH100, PTH120
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from types import ModuleType
from typing import Any

__all__: list[str] = []

_HERE = os.path.dirname(os.path.abspath(__file__))
_RUN = (
    "it starts processes itself, which mpiddp leaves to the launcher: mpirun -n 4 python -m mpiddp.as_horovod script.py"
)


class _Horovod:
    """Finds ``horovod`` before anything on the path can, and loads it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """A spec for ``horovod``; those submodules that are served come with it, and any other is an error."""
        if name == "horovod":
            return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        if name.startswith("horovod."):
            launcher = name.startswith(("horovod.run", "horovod.ray", "horovod.spark"))
            reason = _RUN if launcher else "mpiddp serves horovod.torch and what that needs of horovod.common"
            raise ModuleNotFoundError(f"No module named {name!r}: {reason}", name=name)
        return None

    def create_module(self, spec: ModuleSpec) -> None:
        """An ordinary module will do."""

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module ``horovod``."""
        if "mpiddp" not in sys.modules:
            # The one that this file belongs to, wherever the script's own path may lead.
            spec = PathFinder.find_spec("mpiddp", [os.path.dirname(os.path.dirname(os.path.dirname(_HERE)))])
            assert spec is not None and spec.loader is not None
            sys.modules["mpiddp"] = module_from_spec(spec)
            try:
                spec.loader.exec_module(sys.modules["mpiddp"])
            except BaseException:
                del sys.modules["mpiddp"]
                raise
        from mpiddp.as_horovod.served import serve

        serve(module)


def _run_the_next() -> None:
    sys.path[:] = [part for part in sys.path if part != _HERE]
    spec = PathFinder.find_spec("sitecustomize")
    if spec is not None and spec.loader is not None:
        module = sys.modules["sitecustomize"] = module_from_spec(spec)
        spec.loader.exec_module(module)


sys.meta_path.insert(0, _Horovod())
_run_the_next()
