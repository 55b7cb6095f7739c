"""Exchanges of tensors that lie on a device: on the exchange's own streams, by way of whole copies in host memory where
they are small, segment by segment where they are large."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence

import torch

from ..collectives import cuda_ipc, nccl
from ..memory.streams import Device, Passage, on_exchange_streams
from ..transport.base import Link, Steps
from ..transport.device import DeviceLink, Ways
from .lane import Lane
from .request import Handle

__all__ = ["WHOLE_NBYTES", "How", "Over", "Start", "carried", "crossing", "depart", "launch", "placed"]

#: Up to here a tensor is exchanged as a whole copy in host memory: two copies and the CPU's collective cost less than
#: the ring's kernels and pieces.
WHOLE_NBYTES = 256 << 10

#: An exchange that works on the tensor it is given, over the link that it is given.
Start = Callable[[Link, torch.Tensor], Steps]

#: Such an exchange as an exchange of a tensor that lies elsewhere.
Over = Callable[..., Steps]


def carried(passages: Sequence[Passage], build: Callable[[], Steps]) -> Steps:
    """The exchange that ``build`` makes, on the streams of the passages' devices, behind what made the tensors.

    A generator inherits the streams of whoever resumes it, so they are set, and set back, around each step.
    """
    with on_exchange_streams(passages):
        for passage in passages:
            passage.begin()
        steps = build()
    while True:
        with on_exchange_streams(passages):
            try:
                mark = next(steps)
            except StopIteration:
                return
        yield mark


class How(enum.Enum):
    """In which form a tensor of a device is exchanged; the same on every member."""

    BY_SIZE = enum.auto()
    WHOLE = enum.auto()
    PIECES = enum.auto()


def placed(link: Link, flat: torch.Tensor, start: Start, how: How = How.BY_SIZE) -> Steps:
    """``start`` over ``flat`` where it lies, piece by piece, or over a whole copy of it in host memory; on the exchange
    stream."""
    ways = link.ways
    device = ways.devices.of(flat)
    if how is How.WHOLE or (how is How.BY_SIZE and flat.nbytes <= WHOLE_NBYTES):
        return _by_host(ways, device, flat, lambda host: start(link, host))
    return _by_pieces(link, device, flat, start)


def _by_pieces(link: Link, device: Device, flat: torch.Tensor, start: Start) -> Steps:
    yield from nccl.agree(link, flat.device)
    yield from cuda_ipc.agree(link, flat.device)
    yield from start(DeviceLink(link, device), flat)


def _by_host(ways: Ways, device: Device, flat: torch.Tensor, start: Callable[[torch.Tensor], Steps]) -> Steps:
    buffer = ways.pinned.take(flat.nbytes)
    host = buffer[: flat.nbytes].view(flat.dtype)
    device.driver.copy(flat, host)
    copied = device.exchange.record_event()
    while not copied.query():
        yield None
    yield from start(host)
    device.driver.copy(host, flat)
    ways.pinned.give_back(buffer, after=device.exchange.record_event())


def depart(link: Link, flat: torch.Tensor) -> Passage | None:
    """For a tensor that lies on a device: the calling thread's stream hands it over now."""
    return None if flat.is_cpu else link.ways.devices.depart(flat)


def crossing(link: Link, flat: torch.Tensor, passage: Passage | None, start: Start, how: How = How.BY_SIZE) -> Steps:
    """The exchange ``start(link, flat)``, wherever ``flat`` lies; ``passage`` is what :func:`depart` gave."""
    if passage is None:
        return start(link, flat)
    return _crossing(link, flat, passage, start, how)


def _crossing(link: Link, flat: torch.Tensor, passage: Passage, start: Start, how: How) -> Steps:
    yield from carried([passage], lambda: placed(link, flat, start, how))
    passage.finish()


def launch(
    lane: Lane,
    name: str,
    flat: torch.Tensor,
    start: Callable[[Link, torch.Tensor, int], Steps],
    how: How = How.BY_SIZE,
) -> Handle:
    """Launch ``start(link, flat, tag)`` on ``lane``, wherever ``flat`` lies."""
    passage = depart(lane.link, flat)
    if passage is None:
        return lane.launch(name, lambda link, tag: start(link, flat, tag))

    def cross(link: Link, tag: int) -> Steps:
        return crossing(link, flat, passage, lambda link, flat: start(link, flat, tag), how)

    handle = lane.launch(name, cross)
    handle.passage = passage
    return handle
