"""Torch's modes belong to a thread, and a generator inherits the state of whoever resumes it: a push leaves them
outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["apart_from_modes", "is_neutral", "without_modes"]

_T = TypeVar("_T")

_inference, _autocast = torch.is_inference_mode_enabled, torch._C._is_any_autocast_enabled
_dispatch, _function = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack


def is_neutral() -> bool:
    """Whether none of these modes is on: inference mode, autocast, dispatch and function modes (a default device).

    Gradients need no guard: no tensor of an exchange requires grad.
    """
    return not (_inference() or _autocast() or _dispatch() or _function())


def apart_from_modes(call: Callable[[], _T]) -> _T:
    """``call()`` without any of these modes."""
    with without_modes():
        return call()


@contextmanager
def without_modes() -> Iterator[None]:
    """A context without any of these modes."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch._C.DisableTorchFunction())
        if _dispatch():
            stack.enter_context(_disable_current_modes())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
