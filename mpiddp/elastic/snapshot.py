"""Copies that later changes do not reach, with their tensors in host memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Kept", "keep", "restored", "snapshot"]


class Kept:
    """A tensor of a device, as its values in host memory."""

    __slots__ = ("device", "values")

    def __init__(self, values: torch.Tensor, device: torch.device) -> None:
        self.values, self.device = values, device

    def __repr__(self) -> str:
        return f"Kept({tuple(self.values.shape)}, of {self.device})"


def snapshot(name: str, value: Any) -> Any:
    """A deep copy of ``value``; ``name`` is for the error when there can be none.

    Dicts keep their class and attributes, such as the versions that a ``state_dict`` carries.
    """
    return _checked(name, value, _on_host)


def keep(name: str, value: Any) -> Any:
    """The same, which :func:`restored` copies again, with tensors on the devices that they were on."""
    return _checked(name, value, _kept)


def restored(name: str, value: Any) -> Any:
    """A deep copy of what was kept: later changes do not reach that."""
    return _checked(name, value, _back)


def _checked(name: str, value: Any, copy_leaf: Callable[[Any], Any]) -> Any:
    try:
        return _copied(value, copy_leaf)
    except Exception as error:
        raise TypeError(
            f"the attribute {name!r} of an elastic state cannot be copied, so it could not be restored either: "
            f"{type(error).__name__}: {error}. Keep it out of the state, or give it state_dict() and load_state_dict()"
        ) from error


def _copied(value: Any, copy_leaf: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        new = copy.copy(value)
        for key in new:
            new[key] = _copied(value[key], copy_leaf)
        return new
    if type(value) in (list, tuple):
        return type(value)(_copied(item, copy_leaf) for item in value)
    return copy_leaf(value)


def _is_tensor(value: Any) -> bool:
    return type(value) in (torch.Tensor, torch.nn.Parameter)


def _on_host(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if _is_tensor(value) else copy.deepcopy(value)


def _kept(value: Any) -> Any:
    is_apart = _is_tensor(value) and value.device.type != "cpu"
    return Kept(_on_host(value), value.device) if is_apart else _on_host(value)


def _back(value: Any) -> Any:
    return value.values.to(value.device, copy=True) if isinstance(value, Kept) else _on_host(value)
