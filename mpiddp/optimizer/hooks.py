"""A call for each gradient that autograd has accumulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .. import processes
from ..uncompiled import uncompiled

__all__ = ["watch_gradient"]

#: The hook of each parameter. A parameter that is wrapped again belongs to the newer wrapper.
_registered: Any = WeakIdKeyDictionary()


def watch_gradient(param: torch.Tensor, came: Callable[[], None]) -> None:
    """Call ``came()`` whenever autograd has accumulated into ``param.grad``, in this process alone, without gradients.

    A frozen parameter is watched too: it may be trained later.
    """
    generation = processes.generation()

    @uncompiled
    def hook(_: torch.Tensor) -> None:
        if processes.generation() != generation:  # a forked child
            return
        if torch.is_grad_enabled():  # backward(create_graph=True)
            with torch.no_grad():
                came()
        else:
            came()

    earlier = _registered.pop(param, None)
    if earlier is not None:
        earlier.remove()
    if not (param.is_floating_point() or param.is_complex()):
        return
    trained = param.requires_grad
    try:
        param.requires_grad_(True)  # a tensor that requires no gradient takes no hook
        _registered[param] = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    finally:
        param.requires_grad_(trained)
