"""Torch's modes belong to a thread, and a generator inherits the state of whoever resumes it: a push leaves them
outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["neutral"]

_NOTHING: AbstractContextManager[None] = nullcontext()


def neutral() -> AbstractContextManager[None]:
    """A context without inference mode, autocast, dispatch and function modes (such as a default device).

    Looking costs 0.3 us; the context itself is entered only where something is set. Gradients need no guard: no
    tensor of an exchange requires grad.
    """
    if not (
        torch.is_inference_mode_enabled()
        or torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
    ):
        return _NOTHING
    return _without_modes()


@contextmanager
def _without_modes() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch._C.DisableTorchFunction())
        if torch._C._len_torch_dispatch_stack():
            stack.enter_context(_disable_current_modes())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
