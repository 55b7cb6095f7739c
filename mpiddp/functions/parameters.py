"""broadcast_parameters: every rank starts with the root's weights and buffers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .. import runtime
from ..dtypes import name_of
from ..log import logger
from .flat import broadcast_tensors, check_root
from .objects import broadcast_object
from .problems import raise_together

__all__ = ["broadcast_parameters"]

Params = Mapping[str, Any] | Iterable[tuple[str, torch.Tensor]] | Iterable[torch.Tensor]


def broadcast_parameters(params: Params, root_rank: int = 0) -> None:
    """Overwrite ``params`` in place with those of the root.

    Tensors meet by name, so ranks may hold them in different orders and on different devices; names, shapes and dtypes
    must agree. ``model.state_dict()`` includes the buffers (BatchNorm's statistics), ``model.named_parameters()`` does
    not. Any dtype and memory layout; small tensors travel together, in buffers of 32 MiB.

    Args:
        params: a ``state_dict()``, or an iterable of ``(name, tensor)``, or of tensors, then named by position.
        root_rank: the rank whose values all others take.

    Raises:
        ValueError: ``params`` is something else, a name occurs twice, or ``root_rank`` is no rank of the world.
        MismatchError: on every rank: names the tensor, the rank and both values. Nothing has been changed then.
    """
    tensors = _named(params)
    check_root(root_rank)
    if runtime.size() == 1:
        return
    ours = {name: _Spec.of(tensor) for name, tensor in tensors.items()}
    is_root = runtime.rank() == root_rank
    roots = broadcast_object(ours if is_root else None, root_rank, "broadcast_parameters.table")
    raise_together("broadcast_parameters", _problem(ours, roots, root_rank))
    broadcast_tensors((tensors[name] for name in roots), root_rank, "broadcast_parameters")


@dataclasses.dataclass(frozen=True)
class _Spec:
    """What of a tensor must be the same on all ranks, or why it cannot be broadcast at all."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    unusable: str = ""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Spec:
        if torch.nn.parameter.is_lazy(tensor):
            return cls((), tensor.dtype, "has no shape yet: send a batch through the model first")
        if tensor.layout is not torch.strided:
            return cls(tuple(tensor.shape), tensor.dtype, f"has the layout {tensor.layout}: only dense ones can travel")
        if tensor.device.type == "meta":
            return cls(tuple(tensor.shape), tensor.dtype, "is on the meta device and has no values to broadcast")
        return cls(tuple(tensor.shape), tensor.dtype)

    def __str__(self) -> str:
        return f"{name_of(self.dtype)} of shape {self.shape}"


def _problem(ours: dict[str, _Spec], roots: dict[str, _Spec], root_rank: int) -> str | None:
    """The first way in which our tensors differ from the root's, in words; None if they do not."""
    problems = [f"{name} {spec.unusable}" for name, spec in ours.items() if spec.unusable]
    problems += [f"{name} is missing here and present on rank {root_rank}" for name in roots if name not in ours]
    problems += [f"{name} is present here and missing on rank {root_rank}" for name in ours if name not in roots]
    problems += [
        f"{name} is {ours[name]} here and {spec} on rank {root_rank}"
        for name, spec in roots.items()
        if name in ours and ours[name] != spec
    ]
    if not problems:
        return None
    return problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")


def _named(params: Params) -> dict[str, torch.Tensor]:
    if isinstance(params, Mapping):
        pairs = [pair for pair in params.items() if not _is_foreign(*pair)]
    elif isinstance(params, Iterable) and not isinstance(params, (torch.Tensor, torch.nn.Module, str, bytes)):
        pairs = [pair if isinstance(pair, tuple) else (str(number), pair) for number, pair in enumerate(params)]
    else:
        raise ValueError(_expected(f"a {type(params).__name__}"))
    tensors: dict[str, torch.Tensor] = {}
    for pair in pairs:
        if len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], torch.Tensor):
            raise ValueError(_expected(f"an entry of type {type(pair[-1]).__name__} in a {type(params).__name__}"))
        name, tensor = pair
        if name in tensors:
            raise ValueError(f"broadcast_parameters: the name {name!r} occurs twice")
        tensors[name] = tensor
    return tensors


def _is_foreign(name: str, value: Any) -> bool:
    """Whether ``value`` is an entry of a state_dict that cannot be overwritten in place, and need not be."""
    if value is None:
        return True
    if str(name).endswith("_extra_state") and not isinstance(value, torch.Tensor):
        logger.warning("broadcast_parameters leaves out %s, which is no tensor but a %s", name, type(value).__name__)
        return True
    return False


def _expected(what: str) -> str:
    return (
        f"broadcast_parameters takes model.state_dict(), or (name, tensor) pairs as from model.named_parameters(), "
        f"not {what}; for an optimizer see broadcast_optimizer_state, for other objects broadcast_object"
    )
