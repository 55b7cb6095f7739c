"""What ``DistributedOptimizer`` was given, checked. Each rank checks for itself: nothing here communicates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..collectives.base import cut
from ..compression import is_lossy
from ..op import Adasum, Average, Op, Sum
from .wrapped import Wrapped

__all__ = ["check_optimizer", "check_ordered", "checked_passes", "groups_by_position", "names_of"]


def check_optimizer(optimizer: torch.optim.Optimizer, op: Op, predivide: float) -> None:
    """Raise TypeError or ValueError unless ``optimizer`` can be distributed at all, with ``op``."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"DistributedOptimizer takes a torch.optim.Optimizer, not a {type(optimizer).__name__}")
    if isinstance(optimizer, Wrapped):
        raise ValueError("this optimizer is distributed already: wrap it once")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS cannot be distributed: it evaluates the loss several times a step and decides from local values how "
            "often, so the ranks would drift apart; use a first-order optimizer"
        )
    if op not in (Average, Sum, Adasum):
        raise ValueError(f"gradients are averaged or summed, so op is Average, Sum or Adasum, not {op!r}")
    if not predivide > 0:
        raise ValueError(f"gradient_predivide_factor must be positive, not {predivide!r}")
    if predivide != 1.0 and op is not Average:
        raise ValueError(f"gradient_predivide_factor={predivide} splits the division of an Average; op is {op!r}")


def check_ordered(is_ordered: bool, op: Op, compression: Any) -> None:
    """Raise ValueError for what has no order of its own in which it could be summed."""
    if is_ordered and (op is Adasum or is_lossy(compression)):
        what = "op=Adasum" if op is Adasum else f"lossy compression ({getattr(compression, '__name__', compression)})"
        raise ValueError(
            f"deterministic=True (or MPIDDP_DETERMINISTIC=1) does not go with {what}: leave one of them out"
        )


def groups_by_position(
    params: Sequence[torch.Tensor], num_groups: int, groups: int | Sequence[Sequence[torch.Tensor]] | None
) -> dict[int, int]:
    """The number of the group of each parameter that is in one, by its position."""
    if isinstance(groups, int) and not isinstance(groups, bool):
        num_groups, groups = groups, None
    if groups is None:
        if isinstance(num_groups, bool) or not isinstance(num_groups, int) or num_groups < 0:
            raise ValueError(f"num_groups is a whole number of at least 0, not {num_groups!r}")
        parts = cut(0, len(params), num_groups) if num_groups else []
        return {index: number for number, (lo, hi) in enumerate(parts) for index in range(lo, hi)}
    if not isinstance(groups, (list, tuple)) or any(not isinstance(group, (list, tuple)) for group in groups):
        raise ValueError("groups must be a number, or a list of lists of parameters")
    position = {id(param): index for index, param in enumerate(params)}
    found: dict[int, int] = {}
    for number, group in enumerate(groups):
        for param in group:
            index = position.get(id(param))
            if index is None:
                raise ValueError(f"groups[{number}] has a tensor that is no parameter of the optimizer")
            if index in found:
                raise ValueError(f"a parameter is in groups {found[index]} and {number}; groups must not overlap")
            found[index] = number
    return found


def checked_passes(passes: int) -> int:
    """``passes``, which is ``backward_passes_per_step``, if it is one."""
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise ValueError(f"backward_passes_per_step is a whole number of at least 1, not {passes!r}")
    return passes


def names_of(
    optimizer: torch.optim.Optimizer,
    params: list[torch.Tensor],
    named_parameters: Iterable[tuple[str, torch.Tensor]] | None,
) -> list[str]:
    """A name for each parameter: the given ones, or its group and place."""
    if named_parameters is None:
        return [
            f"group{number}.{at}"
            for number, group in enumerate(optimizer.param_groups)
            for at in range(len(group["params"]))
        ]
    pairs = list(named_parameters)
    if any(not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)) for pair in pairs):
        raise ValueError(
            "named_parameters must be pairs of a name and a parameter, as model.named_parameters() gives them"
        )
    seen: set[str] = set()
    duplicates = sorted({name for name, _ in pairs if name in seen or seen.add(name)})  # type: ignore[func-returns-value]
    if duplicates:
        raise ValueError(f"named_parameters has names more than once: {', '.join(duplicates)}; names must be unique")
    name_of = {id(param): name for name, param in pairs}
    unnamed = [at for at, param in enumerate(params) if id(param) not in name_of]
    if unnamed:
        raise ValueError(
            f"named_parameters names {len(params) - len(unnamed)} of the optimizer's {len(params)} parameters; "
            f"those at positions {unnamed[:10]} have no name. Pass the named_parameters() of every model that it "
            "optimizes, or none"
        )
    return [name_of[id(param)] for param in params]
