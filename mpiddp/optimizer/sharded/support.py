"""Which optimizers may be sharded: those that treat every element of a parameter by itself."""

from __future__ import annotations

import torch

from ...op import Adasum, Op

__all__ = ["check_shardable", "fused_class"]

_ELEMENTWISE = (
    "SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "Adagrad", "Adadelta", "ASGD"
)  # fmt: skip

#: Why not, where that is known.
_REFUSED = {
    "Adafactor": "it keeps the row and column sums of whole matrices",
    "Muon": "it orthogonalizes whole matrices",
    "LBFGS": "it evaluates the loss several times a step and decides from local values how often",
    "SparseAdam": "it takes sparse gradients, and parts of flat tensors are dense",
}

_FUSED = tuple(getattr(torch.optim, name) for name in ("SGD", "Adam", "AdamW", "Adagrad"))


def check_shardable(optimizer: torch.optim.Optimizer, op: Op) -> None:
    """Raise ValueError, saying why, for an optimizer whose update of a part is not a part of its update.

    A class of the user's own may say so itself, by an attribute ``is_elementwise``.
    """
    kind, name = type(optimizer), type(optimizer).__name__
    for known, reason in _REFUSED.items():
        if issubclass(kind, getattr(torch.optim, known, ())):
            raise ValueError(f"{known} cannot be used with shard=True: {reason}, and a rank has a part of it only")
    is_elementwise = getattr(kind, "is_elementwise", None)
    if is_elementwise is None:
        is_elementwise = issubclass(kind, tuple(getattr(torch.optim, known) for known in _ELEMENTWISE))
    if not is_elementwise:
        raise ValueError(
            f"{name} is not known to treat every element of a parameter by itself, as shard=True needs. Known are "
            f"{', '.join(_ELEMENTWISE)} and their subclasses; if {name} does too, say so: {name}.is_elementwise = True"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(f"{name}(differentiable=True) cannot be used with shard=True: no graph crosses the ranks")
    if op is Adasum:
        raise ValueError("op=Adasum combines the steps of whole optimizers; with shard=True op is Average or Sum")


def fused_class(kind: type[torch.optim.Optimizer]) -> bool:
    """Whether torch has a fused kernel for this class, which is then faster wherever a flat tensor is updated."""
    return kind in _FUSED
