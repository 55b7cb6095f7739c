"""What a caller asks for, and what is handed out in return."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..collectives.base import ReduceOp

__all__ = ["Handle", "Kind", "Request", "Signature"]


class Kind(enum.IntEnum):
    """Which collective."""

    ALLREDUCE = 0
    BROADCAST = 1
    ALLGATHER = 2
    BARRIER = 3


class Signature(NamedTuple):
    """What must be the same on every rank. It travels as a plain tuple; the field names appear in the errors."""

    kind: int
    dtype: str
    shape: tuple[int, ...]
    op: int
    root: int
    scale: float
    device: str

    def differing(self, other: Signature) -> list[str]:
        """The names of the fields that differ; those that only follow from a differing kind are left out."""
        if self.kind != other.kind:
            return ["kind"]
        return [name for name, mine, theirs in zip(self._fields, self, other, strict=True) if mine != theirs]

    def show(self, name: str) -> str:
        """The value of a field in words."""
        value = getattr(self, name)
        if name == "kind":
            return Kind(value).name.lower()
        return ReduceOp(value).name.lower() if name == "op" else str(value)


class Handle:
    """A result to come. ``error`` is raised by who waits for it, never by who pushed."""

    __slots__ = ("answer", "done", "error", "name", "result")

    def __init__(self, name: str) -> None:
        self.name = name
        self.answer: torch.Tensor | None = None  # what an in-place operation returns: the caller's own tensor
        self.done = False
        self.error: BaseException | None = None
        self.result: Any = None

    def finish(self, result: Any) -> None:
        """The result is there."""
        self.result = result
        self.done = True

    def fail(self, error: BaseException) -> None:
        """There will be no result."""
        self.error = error
        self.done = True

    def __repr__(self) -> str:
        state = "failed" if self.error else "done" if self.done else "in flight"
        return f"Handle({self.name!r}, {state})"


@dataclass(slots=True, eq=False)
class Request:
    """One submitted collective.

    ``key`` is the name, or a number where the caller gave none. ``flat`` is the contiguous 1-D tensor that the
    exchange works on; ``deliver`` turns it, once it holds the answer, into what the caller gets. ``extent`` is what
    may differ between ranks and all have to know, such as dim 0 of an all-gather.
    """

    key: str | int
    signature: Signature
    flat: torch.Tensor
    deliver: Callable[[torch.Tensor], Any]
    extent: tuple[int, ...] = ()
    handle: Handle = field(init=False)

    def __post_init__(self) -> None:
        self.handle = Handle(self.name)

    @property
    def name(self) -> str:
        """The name for errors and traces."""
        return self.key if isinstance(self.key, str) else f"{Kind(self.signature.kind).name.lower()}.unnamed.{self.key}"
