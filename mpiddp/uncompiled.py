"""Functions that torch.compile leaves alone, with all that they call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch._C._dynamo import eval_frame

__all__ = ["uncompiled"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def uncompiled(function: _Function) -> _Function:
    """``function`` itself, marked: inside a compiled function it breaks the graph, and runs as it would outside.

    Costs nothing at each call, in place of 1 us for torch.compiler.disable. Before torch 2.7 what the function calls
    may still be compiled by itself.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    if hasattr(eval_frame, "set_code_exec_strategy"):
        skip = eval_frame._FrameAction.SKIP
        eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    return function
