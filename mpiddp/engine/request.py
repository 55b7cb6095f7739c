"""What a caller asks for, and what is handed out in return."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..collectives.base import ReduceOp
from ..dtypes import dtype_called
from ..memory.streams import Passage

__all__ = ["Handle", "Key", "Kind", "Request", "Signature", "automatic_name", "shown_number"]

#: What tells requests apart: a name; or a number, and in a group without a name, from the second tensor on, the group's
#: number and the tensor's place.
Key = str | int | tuple[int, int]


class Kind(enum.IntEnum):
    """Which collective."""

    ALLREDUCE = 0
    BROADCAST = 1
    ALLGATHER = 2
    BARRIER = 3
    ALLTOALL = 4
    REDUCESCATTER = 5
    JOIN = 6


class Signature(NamedTuple):
    """What must be the same on every rank. It travels as a plain tuple; the field names appear in the errors.

    ``shape`` leaves dim 0 out where that may differ. ``group``: the name (empty if it has none) and the size of the
    group whose requests run together or not at all; ``purpose`` tells requests of the library's own apart.
    """

    kind: int
    dtype: str = "uint8"
    shape: tuple[int, ...] = ()
    op: int = 0
    root: int = 0
    prescale: float = 1.0
    scale: float = 1.0
    device: str = "cpu"
    group: tuple[str, int] | tuple[()] = ()
    purpose: str = ""

    @property
    def nbytes(self) -> int:
        """The size of a tensor of this shape and dtype, in bytes."""
        return math.prod(self.shape) * dtype_called(self.dtype).itemsize

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
        if name == "group":
            return f"{value[1]} tensors" if value else "none"
        return ReduceOp(value).name.lower() if name == "op" else str(value)


_NOWHERE: tuple[tuple[int, ...], int] = (), -1


class Handle:
    """A result to come. ``error`` is raised by who waits for it, never by who pushed.

    ``where`` are the members of the process set, and the number of the lane, or -1. ``passage``: of a tensor that lies
    on a device, which makes the result visible to the stream of whoever waits.
    """

    __slots__ = ("_name", "done", "error", "passage", "result", "where")

    def __init__(self, name: str, where: tuple[tuple[int, ...], int] = _NOWHERE) -> None:
        self._name = name
        self.where = where
        self.done = False
        self.error: BaseException | None = None
        self.passage: Passage | None = None
        self.result: Any = None

    @property
    def name(self) -> str:
        """What the operation is called."""
        return self._name

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


class Request(Handle):
    """One submitted collective, and its own handle.

    ``key`` is the name, or a number where the caller gave none. ``flat`` is the contiguous 1-D tensor that the
    exchange works on; once it holds the answer, the caller gets ``answer``, or what ``deliver`` makes of it.
    ``extent`` is what may differ between ranks and all have to know, such as dim 0 of an all-gather. ``eager``: the
    content may travel with the announcement, since the caller waits and it is small. ``meets``: the members may meet,
    since the caller waits and they share memory.
    """

    __slots__ = ("__weakref__", "answer", "deliver", "eager", "extent", "flat", "key", "meets", "signature")

    def __init__(
        self,
        key: Key,
        signature: Signature,
        flat: torch.Tensor,
        deliver: Callable[[Any], Any] | None = None,
        answer: Any = None,
        extent: tuple[int, ...] = (),
        eager: bool = False,
        meets: bool = False,
    ) -> None:
        self.key = key
        self.signature = signature
        self.flat = flat
        self.deliver = deliver
        self.answer = answer
        self.extent = extent
        self.eager = eager
        self.meets = meets
        self.where = _NOWHERE
        self.done = False
        self.error = None
        self.passage = None
        self.result = None

    @property
    def name(self) -> str:
        """What the operation is called: made when it is asked for, which is seldom."""
        return self.key if isinstance(self.key, str) else automatic_name(self.signature.kind, self.key)

    def complete(self, value: Any) -> None:
        """``value`` is what the exchange made of ``flat``. Where it cannot be delivered, this request alone fails."""
        try:
            result = self.answer if self.deliver is None else self.deliver(value)
        except Exception as error:
            self.fail(error)
        else:
            self.result = result
            if self.passage is not None:
                self.passage.finish(result)
            self.done = True


_KIND_NAMES = [kind.name.lower() for kind in Kind]


def automatic_name(kind: int, number: Key) -> str:
    """What a request without a name is called."""
    return f"{_KIND_NAMES[kind]}.unnamed.{shown_number(number)}"


def shown_number(number: Key) -> str:
    """The number of a request without a name, in a group with the tensor's place behind it."""
    return ".".join(map(str, number)) if isinstance(number, tuple) else str(number)
