"""What the collectives ask of a transport.

An algorithm sees a :class:`Link`: its rank, the number of members, and regions of memory from which elements are sent
and into which they are received. Whether MPI, shared memory or a simulated network lies below is not its business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from .node import Node
from .steps import Steps, drain

if TYPE_CHECKING:
    from ..memory.ipc import DeviceMemory
    from .device import Ways
    from .nccl import Nccl

__all__ = ["Levels", "Link", "Pending", "Region", "Steps", "drain", "nothing_to_move"]

#: Tests a transfer: True once its buffer may be used again (sent) or read (received). Not to be called after it said
#: True.
Pending = Callable[[], bool]


def nothing_to_move() -> bool:
    """The transfer of nothing: always complete."""
    return True


class Region(Protocol):
    """A flat tensor, opened for transfers. Bounds are in elements; the region keeps the tensor alive."""

    def send(self, lo: int, hi: int, peer: int, tag: int) -> Pending:
        """Start to send ``tensor[lo:hi]`` to ``peer``."""
        ...

    def recv(self, lo: int, hi: int, peer: int, tag: int) -> Pending:
        """Start to receive ``tensor[lo:hi]`` from ``peer``. Transfers of one pair and tag arrive in the order sent."""
        ...


class Link(Protocol):
    """The members of a process set as one of them sees them."""

    @property
    def rank(self) -> int:
        """This member's rank within the set."""
        ...

    @property
    def size(self) -> int:
        """The number of members."""
        ...

    @property
    def node(self) -> Node | None:
        """Memory that all members share; None where they are on several nodes, or cannot."""
        ...

    @property
    def gpus(self) -> DeviceMemory | None:
        """Memory of GPUs that all members map; None where they do not, or for tensors in host memory."""
        ...

    @property
    def nccl(self) -> Nccl | None:
        """NCCL among the members' GPUs; None where it is not used, or for tensors in host memory."""
        ...

    @property
    def levels(self) -> Levels | None:
        """How the members lie on nodes, if on several, of as many members each and of more than one."""
        ...

    @property
    def algorithm(self) -> str:
        """The algorithm that is wanted wherever it is possible; empty: the one that suits."""
        ...

    @property
    def ways(self) -> Ways:
        """How tensors of devices travel."""
        ...

    def open(self, flat: torch.Tensor) -> Region:
        """``flat``, a contiguous 1-D tensor, ready for transfers."""
        ...


class Levels(NamedTuple):
    """The members on this node, in the order of their ranks; and those that have this one's place on their nodes."""

    local: Link
    cross: Link
