"""A call for each gradient that autograd has accumulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .. import processes
from ..uncompiled import uncompiled

__all__ = ["watch_gradient"]

#: The hooks of each parameter. A parameter that is wrapped again belongs to the newer wrapper.
_registered: Any = WeakIdKeyDictionary()


def watch_gradient(param: torch.Tensor, came: Callable[[], None], coming: Callable[[], None] | None = None) -> None:
    """Call ``came()`` whenever autograd has accumulated into ``param.grad``, in this process alone, without gradients;
    and ``coming()`` when it is about to.

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

    @uncompiled
    def before(_: torch.Tensor) -> None:
        assert coming is not None
        if processes.generation() == generation:
            with torch.no_grad():
                coming()

    for earlier in _registered.pop(param, ()):
        earlier.remove()
    if not (param.is_floating_point() or param.is_complex()):
        return
    trained = param.requires_grad
    try:
        param.requires_grad_(True)  # a tensor that requires no gradient takes no hook
        hooks = [param.register_post_accumulate_grad_hook(hook)]  # type: ignore[no-untyped-call]
        if coming is not None:
            hooks.append(param.register_hook(before))  # type: ignore[no-untyped-call]
        _registered[param] = hooks
    finally:
        param.requires_grad_(trained)
