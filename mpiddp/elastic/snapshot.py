"""Copies that later changes do not reach, with their tensors in host memory."""

from __future__ import annotations

import copy
from typing import Any

import torch

__all__ = ["snapshot"]


def snapshot(name: str, value: Any) -> Any:
    """A deep copy of ``value``; ``name`` is for the error when there can be none.

    Dicts keep their class and attributes, such as the versions that a ``state_dict`` carries.
    """
    try:
        return _copied(value)
    except Exception as error:
        raise TypeError(
            f"the attribute {name!r} of an elastic state cannot be copied, so it could not be restored either: "
            f"{type(error).__name__}: {error}. Keep it out of the state, or give it state_dict() and load_state_dict()"
        ) from error


def _copied(value: Any) -> Any:
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        new = copy.copy(value)
        for key in new:
            new[key] = _copied(value[key])
        return new
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    return copy.deepcopy(value)
