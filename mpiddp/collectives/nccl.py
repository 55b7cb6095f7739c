"""Collectives among the GPUs of a node by NCCL, where ``MPIDDP_LOCAL=nccl`` asks for it.

NCCL's kernels wait on the device for those of the other ranks, so all ranks must enqueue them in one order, or each
waits for another one's for ever. The engine starts what is negotiated in one order, and what a lane launches in one
order, but not the two, nor two lanes, in an order that is the same on all ranks; and a generator is resumed when it is.
So the hosts meet before each collective: when all members have come, local rank 0 gives it the next number, and every
member enqueues in the order of the numbers. Whatever has a number waits for nothing but its members' hosts, so no
kernel waits for what a user has not called yet.

Bits: NCCL chooses the order of the additions by size and topology, and adds 16-bit floats in 16 bits at each of them
(other than ``cuda_ipc.py``, which rounds once). So it is never taken where a reduction must be deterministic.

Cost: one meeting of the hosts, 2(p-1) messages of 8 bytes; then NCCL's own, and one pass over the result to scale it.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch

from ..log import logger
from ..memory.streams import Device
from ..transport import nccl
from ..transport.base import Link, Pending, Steps
from ..transport.device import Ways
from ..transport.nccl import Nccl
from ..transport.steps import Until
from ..transport.tags import MAPPING_TAG
from .base import Bounds, ReduceOp
from .by_hosts import gather_bytes, gather_words, host_of
from .device_reduction import reduce_parts

__all__ = ["agree", "allgather", "allreduce", "broadcast", "reduce_scatter", "takes"]

#: The other ways, for what NCCL is not to do after all.
Otherwise = Callable[[Link], Steps]

_REFUSED = -1


def takes(link: Link, flat: torch.Tensor, op: ReduceOp | None = None) -> Nccl | None:
    """The members' NCCL, if it is to do this; ``op`` is None where nothing is reduced."""
    group = link.nccl
    return group if group is not None and (op is None or nccl.takes(flat.dtype, op.name)) else None


# -- once --------------------------------------------------------------------------------------------------------------


def agree(link: Link, device: torch.device) -> Steps:
    """Where NCCL is asked for: find out, once, whether the members on this node can use it, and start it."""
    within = link if link.levels is None else link.levels.local
    ways = within.ways
    while ways.is_asking:  # another exchange does
        yield None
    if not ways.wants_nccl:
        return
    ways.is_asking = True
    try:
        why = yield from _start(within, ways, device)
        ways.wants_nccl = False
    finally:
        ways.is_asking = False
    if why and within.rank == 0:
        logger.warning("MPIDDP_LOCAL=nccl is not followed on this node, and CUDA IPC is tried in its place: %s", why)


def _start(link: Link, ways: Ways, device: torch.device) -> Until[str]:
    """Why NCCL cannot be used, the same on all members; empty if it can, and then it runs."""
    library, uuid, own = None, "", ""
    try:
        library, uuid = ways.nccl_library(), ways.devices.driver.uuid(device)
    except Exception as error:  # whatever it is, the others must hear of it
        own = str(error) or repr(error)
    uuids = yield from gather_words(link, uuid, MAPPING_TAG)
    reasons = yield from gather_words(link, own, MAPPING_TAG)
    why = nccl.problem(list(zip(uuids, reasons, strict=True)))
    if why or library is None:
        return why
    uid, own = bytes(nccl.UID_NBYTES), ""
    if link.rank == 0:
        try:
            uid = bytes(library.get_unique_id())
        except Exception as error:
            own = str(error) or repr(error)
    uids = yield from gather_bytes(link, uid, nccl.UID_NBYTES, MAPPING_TAG)
    if any(uids[0]):
        stream = ways.devices.of_device(device).handle
        starting = _Starting(lambda: Nccl(library, uids[0], link.size, link.rank, device, stream), ways, device)
        while starting.is_alive():  # this rank goes on pushing meanwhile
            yield None
        own = starting.why
        ways.nccl = starting.group
    told = yield from gather_words(link, own, MAPPING_TAG)
    found = [f"local rank {rank}: {reason}" for rank, reason in enumerate(told) if reason]
    if found and ways.nccl is not None:
        ways.nccl.close(is_clean=False)
        ways.nccl = None
    return found[0] if found else ""


class _Starting(threading.Thread):
    """NCCL's start blocks until all members have come, and takes up to some seconds; then ``group``, or ``why`` not.

    A peer that never comes leaves this thread behind, and the exchange waiting, which a stall's report names.
    """

    def __init__(self, start: Callable[[], Nccl], ways: Ways, device: torch.device) -> None:
        super().__init__(name="mpiddp: NCCL starts", daemon=True)
        self.group: Nccl | None = None
        self.why = ""
        self._start_it, self._driver, self._stream = start, ways.devices.driver, ways.devices.of_device(device).exchange
        self.start()

    def run(self) -> None:
        try:
            with self._driver.on(self._stream):  # its device is the current one of this thread, too
                self.group = self._start_it()
        except Exception as error:  # whatever it is, the others must hear of it
            self.why = str(error) or repr(error)


# -- each time ---------------------------------------------------------------------------------------------------------


def allreduce(
    link: Link, group: Nccl, flat: torch.Tensor, op: ReduceOp, tag: int, scale: float, otherwise: Otherwise
) -> Steps:
    """``flat`` becomes ``scale * (x_0 op ... op x_{p-1})`` on every rank."""

    def finish() -> None:
        if scale != 1.0:
            reduce_parts(op, [flat], [flat], scale)

    return _exchange(link, group, flat, tag, lambda: group.all_reduce(flat, op.name), finish, otherwise)


def reduce_scatter(
    link: Link,
    group: Nccl,
    flat: torch.Tensor,
    bounds: Bounds,
    op: ReduceOp,
    tag: int,
    scale: float,
    otherwise: Otherwise,
) -> Steps:
    """``flat[slice(*bounds[r])]`` becomes the reduction of that chunk on rank r; the others may be overwritten."""
    shard = flat[slice(*bounds[link.rank])]

    def finish() -> None:
        if scale != 1.0:
            reduce_parts(op, [shard], [shard], scale)

    return _exchange(link, group, flat, tag, lambda: group.reduce_scatter(flat, bounds, op.name), finish, otherwise)


def allgather(link: Link, group: Nccl, flat: torch.Tensor, bounds: Bounds, tag: int, otherwise: Otherwise) -> Steps:
    """Every rank's ``flat[slice(*bounds[r])]`` reaches all ranks."""
    return _exchange(link, group, flat, tag, lambda: group.all_gather(flat, bounds), _nothing, otherwise)


def broadcast(link: Link, group: Nccl, flat: torch.Tensor, root: int, tag: int, otherwise: Otherwise) -> Steps:
    """``flat`` becomes what it is on ``root``, on every rank."""
    return _exchange(link, group, flat, tag, lambda: group.broadcast(flat, root), _nothing, otherwise)


def _nothing() -> None:
    """There is nothing to scale."""


def _exchange(
    link: Link,
    group: Nccl,
    flat: torch.Tensor,
    tag: int,
    enqueue: Callable[[], None],
    finish: Callable[[], None],
    otherwise: Otherwise,
) -> Steps:
    """``enqueue()`` in its turn, and ``finish()`` when the device has done that; or all members take the other ways,
    where the tensor of one lies on a GPU that is not its communicator's."""
    if not flat.numel():
        return
    if group.error is not None:
        raise group.error
    device: Device = link.ways.devices.of(flat)
    words = torch.zeros(link.size, dtype=torch.int64, device="cpu")  # kept until they have left
    words[0] = flat.device == group.device
    number, told = yield from _turn(host_of(link), group, tag, words)
    if number == _REFUSED:
        yield from _all(told)
        without: Any = copy.copy(link)
        without.nccl = None
        yield from otherwise(without)
        return
    group.next = number + 1  # also where it fails, so that those behind it fail, too, and do not wait
    device.timed(enqueue)
    done = device.exchange.record_event()
    yield from _all(told)
    while not done.query():
        group.check()
        yield None
    finish()


def _turn(link: Link, group: Nccl, tag: int, words: torch.Tensor) -> Until[tuple[int, list[Pending]]]:
    """The number of this collective when it is its turn here, or _REFUSED; and what local rank 0 still sends.

    ``words[0]``: whether this member can take part. Ends without having yielded since the number was given, or came
    up: whoever asked is to enqueue at once.
    """
    region, peers = link.open(words), range(1, link.size)
    if link.rank == 0:
        yield from _all([region.recv(peer, peer + 1, peer, tag) for peer in peers])
        number = group.next if bool(words.all()) else _REFUSED
        words.fill_(number)
        return number, [region.send(peer, peer + 1, peer, tag) for peer in peers]
    yield from _all([region.send(0, 1, 0, tag), region.recv(1, 2, 0, tag)])
    number = int(words[1])
    while number != _REFUSED and number != group.next:
        yield None
    return number, []


def _all(pending: list[Pending]) -> Steps:
    while pending := [each for each in pending if not each()]:
        yield None
