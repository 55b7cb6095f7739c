"""Device memory through pinned host buffers: for an MPI that must not be given device pointers.

A transfer is cut into pieces; while one piece is on the network, the next is copied to the host and the one before it
to the device. Both sides cut alike. Cost: each byte crosses the bus once on each side, and the host's memory twice.
"""

from __future__ import annotations

import torch

from ..memory.pinned import Pinned
from ..memory.streams import Device, Event
from .base import Link, Pending
from .transfers import Transfer

__all__ = ["MOST", "PIECE_NBYTES", "receives", "sends"]

#: A piece: some 80 us on a bus of 50 GB/s, against some 30 us that its handling costs the host.
PIECE_NBYTES = 4 << 20

#: Pieces that one peer and direction has buffers for: one copied, two on the network, one waiting.
MOST = 4


def sends(host: Link, device: Device, pinned: Pinned, piece: torch.Tensor, peer: int, tag: int) -> list[Transfer]:
    """What sends the contiguous device tensor ``piece``, as the exchange stream has it now."""
    ready = device.exchange.record_event()
    return [_Send(host, device, pinned, part, peer, tag, ready) for part in _cut(piece)]


def receives(host: Link, device: Device, pinned: Pinned, piece: torch.Tensor, peer: int, tag: int) -> list[Transfer]:
    """What receives into ``piece``, which the exchange stream has read for the last time now."""
    ready = device.exchange.record_event()
    return [_Receive(host, device, pinned, part, peer, tag, ready) for part in _cut(piece)]


def _cut(piece: torch.Tensor) -> tuple[torch.Tensor, ...]:
    numel = max(1, PIECE_NBYTES // piece.element_size())
    return torch.split(piece, numel) if piece.numel() > numel else (piece,)


class _Staged:
    __slots__ = ("_buffer", "_device", "_host", "_peer", "_pending", "_piece", "_pinned", "_ready", "_tag")

    def __init__(
        self, host: Link, device: Device, pinned: Pinned, piece: torch.Tensor, peer: int, tag: int, ready: Event
    ) -> None:
        self._host, self._device, self._pinned = host, device, pinned
        self._piece, self._peer, self._tag, self._ready = piece, peer, tag, ready
        self._buffer: torch.Tensor
        self._pending: Pending

    def _take(self) -> torch.Tensor:
        """A staging buffer's part that is as the piece."""
        self._buffer = self._pinned.take(self._piece.nbytes)
        return self._view()

    def _view(self) -> torch.Tensor:
        return self._buffer[: self._piece.nbytes].view(self._piece.dtype)


class _Send(_Staged):
    __slots__ = ("_copied",)

    def prepare(self) -> bool:
        room, device = self._take(), self._device
        device.out.wait_event(self._ready)
        with device.driver.on(device.out):
            device.driver.copy(self._piece, room)
        # Overlap: the network has this piece while the next one is copied.
        self._copied = device.out.record_event()
        return True

    def post(self) -> bool:
        if not self._copied.query():
            return False
        room = self._view()
        self._pending = self._host.open(room).send(0, room.numel(), self._peer, self._tag)
        return True

    def complete(self) -> bool:
        if not self._pending():
            return False
        self._pinned.give_back(self._buffer)
        return True


class _Receive(_Staged):
    __slots__ = ()

    def prepare(self) -> bool:
        self._take()
        return True

    def post(self) -> bool:
        room = self._view()
        self._pending = self._host.open(room).recv(0, room.numel(), self._peer, self._tag)
        return True

    def complete(self) -> bool:
        """The copy to the device is only enqueued: the exchange stream waits for it, not the host."""
        if not self._pending():
            return False
        device = self._device
        device.back.wait_event(self._ready)
        with device.driver.on(device.back):
            device.driver.copy(self._view(), self._piece)
        # Overlap: the next piece is copied while this one is added.
        copied = device.back.record_event()
        device.exchange.wait_event(copied)
        self._pinned.give_back(self._buffer, after=copied)
        return True
