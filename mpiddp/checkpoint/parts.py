"""What a checkpoint holds, thing by thing: how each is taken down and put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import runtime
from ..errors import ArgumentError
from ..functions import broadcast_optimizer_state, broadcast_parameters
from .directory import Sum, checked_file, write_file

if TYPE_CHECKING:
    from .sharded import Written

__all__ = ["Kept", "kept"]


class Kept:
    """Anything with ``state_dict()`` and ``load_state_dict()``: a scheduler, a GradScaler, an average of weights.

    All ranks hold the same: rank 0's is written.
    """

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value

    def note(self) -> Any:
        """What rank 0 needs of every rank, itself included, to take the state down: nothing."""
        return None

    def state(self, notes: Sequence[Any]) -> Any:
        """What rank 0 writes. ``notes`` are those of all ranks."""
        return self.value.state_dict()

    def write(self, folder: Path) -> tuple[Written | None, dict[str, Sum]]:
        """Write this rank's own part, if it has one, into ``folder``; what was written, and which files."""
        return None, {}

    def finish(self, folder: Path, written: Sequence[Any]) -> dict[str, Sum]:
        """On rank 0, when all ranks have written their parts; the files that were added."""
        return {}

    def load(self, state: Any, folder: Path) -> Any:
        """On rank 0: put the state back; what is returned is sent to :meth:`share` on all ranks."""
        self.value.load_state_dict(state)
        return state

    def share(self, state: Any) -> None:
        """On all ranks: become what rank 0 is. Collective."""
        if runtime.rank() != 0:
            self.value.load_state_dict(state)


class KeptModel(Kept):
    """Parameters and buffers, and what modules add to them (``get_extra_state()``)."""

    def state(self, notes: Sequence[Any]) -> Any:
        """The model's state_dict, of tensors with memory of their own."""
        return _own_memory(self.value.state_dict())

    def load(self, state: Any, folder: Path) -> Any:
        """As in the base class; but the tensors travel by themselves."""
        self.value.load_state_dict(state)
        return {key: value for key, value in state.items() if not _is_tensor_of_model(key, value)}

    def share(self, state: Any) -> None:
        """Take over rank 0's."""
        mine = self.value.state_dict()
        broadcast_parameters({key: value for key, value in mine.items() if _is_tensor_of_model(key, value)}, 0)
        if state and runtime.rank() != 0:
            mine.update(state)
            self.value.load_state_dict(mine)


class KeptOptimizer(Kept):
    """An optimizer; with ``shard=True`` each rank writes the part of the state that it holds."""

    def _parts(self) -> Any:
        return self.value._mpiddp_parts() if hasattr(self.value, "_mpiddp_parts") else None

    def _memory(self) -> Any:
        return self.value._mpiddp_memory() if hasattr(self.value, "_mpiddp_memory") else None

    def _memory_of(self, folder: Path, rank: int) -> Path:
        return folder / self.name / f"powersgd_{rank}.pt"

    def state(self, notes: Sequence[Any]) -> Any:
        """The whole state; or the options, and the names by which the parts of the rest are found."""
        if self._parts() is None:
            state = self.value.state_dict()
            if "powersgd" in state:  # each rank writes its own errors
                state["powersgd"] = {key: value for key, value in state["powersgd"].items() if key != "error"}
            return state
        names = self.value._mpiddp_reducer.gradients.names
        return {"rest": self.value._mpiddp_rest(), "names": list(names)}

    def write(self, folder: Path) -> tuple[Written | None, dict[str, Sum]]:
        """This rank's part of the state, where it has one."""
        parts, memory, rank = self._parts(), self._memory(), runtime.rank()
        if memory is not None:
            path = self._memory_of(folder, rank)
            path.parent.mkdir(exist_ok=True)
            whole = memory.whole()
            return None, {f"{self.name}/{path.name}": write_file(path, lambda file: torch.save(whole, file))}
        if parts is None:
            return None, {}
        from . import sharded  # seldom needed, and half a second to import

        folder = folder / self.name
        folder.mkdir(exist_ok=True)
        written = sharded.write(folder, rank, parts)
        mine = sorted(folder.glob(f"__{rank}_*"))
        return written, {f"{self.name}/{path.name}": checked_file(path) for path in mine}

    def finish(self, folder: Path, written: Sequence[Any]) -> dict[str, Sum]:
        """The table of contents of all parts."""
        if self._parts() is None:
            return {}
        from . import sharded

        sharded.finish(folder / self.name, [found for found in written if found is not None])
        return {f"{self.name}/.metadata": checked_file(folder / self.name / ".metadata")}

    def load(self, state: Any, folder: Path) -> Any:
        """Whole or in parts: rank 0 reads it all."""
        if "names" in state:
            from . import sharded

            whole = sharded.read(folder / self.name, {name: index for index, name in enumerate(state["names"])})
            rest = state["rest"]
            state = {**rest, "state": {**rest["state"], **whole}}
        self.value.load_state_dict(state)
        return None if not isinstance(self.value, torch.optim.LBFGS) else state, str(folder)

    def share(self, state: Any) -> None:
        """Take over rank 0's, and what this rank itself has written of what compression left out."""
        state, folder = state
        if state is not None:
            super().share(state)
            return
        broadcast_optimizer_state(self.value, 0)
        memory, path = self._memory(), self._memory_of(Path(folder), runtime.rank())
        if memory is not None and path.exists():
            memory.take(torch.load(path, map_location="cpu", weights_only=False))


class KeptPlace(Kept):
    """An ElasticSampler: what was recorded by index on any rank counts on all of them."""

    def note(self) -> Any:
        """The indices recorded here."""
        return set(self.value.recorded)

    def state(self, notes: Sequence[Any]) -> Any:
        """The place in the epoch, in samples of all ranks."""
        return self.value.place(set().union(*notes))


def kept(objects: Mapping[str, Any]) -> list[Kept]:
    """How each of ``objects`` is kept. Raises ArgumentError for one that cannot be."""
    found: list[Kept] = []
    for name, value in objects.items():
        if not all(callable(getattr(value, method, None)) for method in ("state_dict", "load_state_dict")):
            raise ArgumentError(
                f"{name}= of a checkpoint is a {type(value).__name__}, which has no state_dict() and load_state_dict()"
                ": give plain values to save() instead"
            )
        if isinstance(value, torch.nn.Module):
            found.append(KeptModel(name, value))
        elif isinstance(value, torch.optim.Optimizer):
            found.append(KeptOptimizer(name, value))
        elif hasattr(value, "place") and hasattr(value, "recorded"):
            found.append(KeptPlace(name, value))
        else:
            found.append(Kept(name, value))
    return found


def _is_tensor_of_model(key: str, value: Any) -> bool:
    """Whether it is the model's own memory; a module's extra state may be anything, made for this state_dict alone."""
    return isinstance(value, torch.Tensor) and key.rpartition(".")[2] != "_extra_state"


def _own_memory(state: Any) -> Any:
    """A state_dict in which no tensor drags along a larger one that it is a view of, as torch.save would write it.

    Tensors that are one tensor (tied weights) stay one.
    """
    copies: dict[Any, torch.Tensor] = {}
    for key, value in list(state.items()):
        if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() != value.nbytes:
            place = (value.data_ptr(), value.dtype, value.shape, value.stride())
            if place not in copies:
                copies[place] = value.detach().clone()
            state[key] = copies[place]
    return state
