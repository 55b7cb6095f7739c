"""A link as an exchange of device tensors sees it: the same members, and pieces that travel by the way that suits each
pair."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..log import logger
from ..memory.ipc import DeviceMemory, of_this_process
from ..memory.pinned import Pinned
from ..memory.streams import Device, Devices, Driver
from . import cuda_aware, staged
from .base import Levels, Link, Pending, nothing_to_move
from .nccl import Nccl, load
from .transfers import Queues

__all__ = ["CUDA_AWARE", "MAPPED", "NCCL", "STAGED", "DeviceLink", "DeviceRegion", "Ways", "way_between"]

STAGED, CUDA_AWARE, MAPPED, NCCL = "staged", "cuda_aware", "mapped", "nccl"


def way_between(link: Link, peer: int, is_near: bool) -> str:
    """By which way large tensors on GPUs reach ``peer``, a member: NCCL, MAPPED, CUDA_AWARE or STAGED. ``is_near``: it
    is on this node. The first two only once an exchange has found out that all on the node can."""
    within = link if link.levels is None else link.levels.local
    if is_near and within.ways.nccl is not None:
        return NCCL
    return MAPPED if is_near and within.ways.mapped else link.ways.way_to(peer)


class Ways:
    """How device tensors of a process set travel: its streams, its staging buffers, and by which transport to whom.

    ``way_to(peer)``, a member's rank, is STAGED or CUDA_AWARE and the same on both sides.
    """

    def __init__(self, way_to: Callable[[int], str] = lambda _: STAGED, driver: Driver | None = None) -> None:
        self.devices = Devices(driver)
        self.pinned = Pinned(self.devices.driver)
        self.way_to = way_to
        self.can_map = False  # whether the members, all on one node, are to map each other's memory
        self.mapped: bool | None = None  # whether they do; None: not found out yet, or
        self.is_asking = False  # just now
        self.wants_nccl = False  # whether the members, all on one node, are still to find out whether they can use it
        self.nccl: Nccl | None = None  # by which they do
        self.nccl_library: Callable[[], Any] = load
        self.stages: list[torch.Tensor] = []  # memory that peers map, for tensors that they cannot map
        self._memory: DeviceMemory | None = None

    @property
    def memory(self) -> DeviceMemory:
        """Memory that peers can map. OSError where there is no driver."""
        if self._memory is None:
            self._memory = of_this_process()
        return self._memory

    @memory.setter
    def memory(self, memory: DeviceMemory) -> None:
        self._memory = memory

    def empty(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A flat tensor, of whatever content, where exchanges need not copy it."""
        if self.can_map and self.mapped is not False:
            try:
                return self.memory.empty(numel, dtype, device)
            except OSError as error:
                logger.debug("no GPU memory that peers could map: %s", error)
        return torch.empty(numel, dtype=dtype, device=device)

    def among(self, ranks: Sequence[int]) -> Ways:
        """The same, for a link among these members."""
        fewer = copy.copy(self)
        fewer.way_to = lambda peer: self.way_to(ranks[peer])
        fewer.can_map, fewer.mapped, fewer.is_asking = False, None, False
        fewer.wants_nccl, fewer.nccl = False, None
        return fewer

    def close(self, is_clean: bool) -> None:
        """Give back what other processes take part in. ``is_clean``: they have done everything, too."""
        if self.nccl is not None:
            self.nccl.close(is_clean)
        self.nccl, self.wants_nccl = None, False

    def __repr__(self) -> str:
        return f"Ways({self.devices!r}, {self.pinned!r})"


class DeviceLink:
    """Lives as long as one exchange, which runs on the exchange stream of ``device``."""

    __slots__ = ("_queues", "_ways", "algorithm", "device", "gpus", "host", "levels", "nccl", "node", "rank", "size")

    def __init__(self, host: Link, device: Device, ways: Ways | None = None, queues: Queues | None = None) -> None:
        self.host, self.device = host, device
        self._ways = host.ways if ways is None else ways
        self._queues = Queues() if queues is None else queues
        self.rank, self.size, self.algorithm = host.rank, host.size, host.algorithm
        self.node = None  # no other process reads a device's memory by a pointer of its own
        self.gpus = self._ways.memory if self._ways.mapped else None
        self.nccl = self._ways.nccl
        self.levels: Levels | None = None
        if host.levels is not None:
            local, cross = host.levels
            self.levels = Levels(DeviceLink(local, device), DeviceLink(cross, device))

    @property
    def ways(self) -> Ways:
        """See :class:`~mpiddp.transport.base.Link`."""
        return self._ways

    def open(self, flat: torch.Tensor) -> DeviceRegion:
        """See :class:`~mpiddp.transport.base.Link`; ``flat`` lies on the device."""
        return DeviceRegion(self, flat, self._ways, self._queues)

    def __repr__(self) -> str:
        return f"DeviceLink({self.device!r}, over {self.host!r})"


class DeviceRegion:
    """A flat device tensor. What is sent is what the exchange stream has written when ``send`` is called."""

    __slots__ = ("_flat", "_link", "_queues", "_ways")

    def __init__(self, link: DeviceLink, flat: torch.Tensor, ways: Ways, queues: Queues) -> None:
        self._link, self._flat, self._ways, self._queues = link, flat, ways, queues

    def send(self, lo: int, hi: int, peer: int, tag: int) -> Pending:
        """See :class:`~mpiddp.transport.base.Region`."""
        return self._move(lo, hi, peer, tag, is_send=True)

    def recv(self, lo: int, hi: int, peer: int, tag: int) -> Pending:
        """See :class:`~mpiddp.transport.base.Region`. Once it is complete, the exchange stream sees what has come."""
        return self._move(lo, hi, peer, tag, is_send=False)

    def _move(self, lo: int, hi: int, peer: int, tag: int, is_send: bool) -> Pending:
        if lo == hi:
            return nothing_to_move
        link, piece, ways = self._link, self._flat[lo:hi], self._ways
        if ways.way_to(peer) == CUDA_AWARE:
            direct = cuda_aware.sends if is_send else cuda_aware.receives
            return self._queues.add(peer, is_send, direct(link.host, link.device, piece, peer, tag), cuda_aware.MOST)
        by_host = staged.sends if is_send else staged.receives
        transfers = by_host(link.host, link.device, ways.pinned, piece, peer, tag)
        return self._queues.add(peer, is_send, transfers, staged.MOST)
