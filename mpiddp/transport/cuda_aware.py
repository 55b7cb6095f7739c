"""Device memory handed to a CUDA-aware MPI, which moves it by the best way that it has: between the GPUs of a node
directly, to other nodes by the network card.

Such an MPI reads and writes at any time after the call and knows no streams: a piece is sent once an event says that it
is written, and received into once an event says that it was read. Only Isend and Irecv of contiguous bytes are used,
which every CUDA-aware MPI can do; reductions are the exchange stream's.
"""

from __future__ import annotations

import torch

from ..memory.streams import Device, Event
from .base import Link, Pending
from .transfers import Transfer

__all__ = ["MOST", "receives", "sends"]

#: Transfers with one peer and direction that MPI has at once.
MOST = 16


def sends(host: Link, device: Device, piece: torch.Tensor, peer: int, tag: int) -> list[Transfer]:
    """What sends the contiguous device tensor ``piece``, as the exchange stream has it now."""
    return [_Send(host, piece, peer, tag, device.exchange.record_event())]


def receives(host: Link, device: Device, piece: torch.Tensor, peer: int, tag: int) -> list[Transfer]:
    """What receives into ``piece``, which the exchange stream has read for the last time now."""
    return [_Receive(host, piece, peer, tag, device.exchange.record_event())]


class _Direct:
    __slots__ = ("_host", "_peer", "_pending", "_piece", "_ready", "_tag")

    def __init__(self, host: Link, piece: torch.Tensor, peer: int, tag: int, ready: Event) -> None:
        self._host, self._piece, self._peer, self._tag, self._ready = host, piece, peer, tag, ready
        self._pending: Pending

    def prepare(self) -> bool:
        return True

    def complete(self) -> bool:
        return self._pending()


class _Send(_Direct):
    __slots__ = ()

    def post(self) -> bool:
        if not self._ready.query():
            return False
        self._pending = self._host.open(self._piece).send(0, self._piece.numel(), self._peer, self._tag)
        return True


class _Receive(_Direct):
    __slots__ = ()

    def post(self) -> bool:
        if not self._ready.query():
            return False
        self._pending = self._host.open(self._piece).recv(0, self._piece.numel(), self._peer, self._tag)
        return True
