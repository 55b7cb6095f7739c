"""Collectives among the GPUs of a node, each of whose ranks maps the others' buckets: a kernel reads them all and
writes the scaled result.

Small tensors in *one shot*: every rank reads all, and writes its own result. Large ones in *two*: every rank reduces
its shard of all buckets and writes the result into all of them. Contributions are combined in the order of the ranks,
16-bit floats in float32 and rounded once, so the bits depend on nothing else.

Ranks may share one GPU, whose time is then sliced between them, so no kernel waits for another process: the hosts tell
each other, before (each says where its tensor lies, when what made it is done) and after. Tensors that peers cannot map
are copied to memory that they can.

Cost: two meetings of the hosts; one shot reads pn elements and writes n; two shots read n and write n, of which (p-1)/p
pass between GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..log import logger
from ..memory.ipc import RECORD_NBYTES, TOKEN_NBYTES, DeviceMemory
from ..memory.streams import Device
from ..transport.base import Link, Steps
from ..transport.device import Ways
from ..transport.tags import MAPPING_TAG
from . import tree
from .base import Bounds, ReduceOp
from .by_hosts import gather_bytes, gather_words, host_of
from .device_reduction import reduce_parts
from .mapped import aligned_cut

__all__ = ["ONE_SHOT_NBYTES", "agree", "allgather", "allreduce", "broadcast", "reduce_scatter"]

#: Up to here every rank reads all contributions. To be measured: at p = 2 the bytes are no more than in two shots.
ONE_SHOT_NBYTES = 512 << 10

#: Memory that peers map, for tensors that they cannot map, is kept for the next one up to this size.
_KEPT_NBYTES = 256 << 20


def agree(link: Link, device: torch.device) -> Steps:
    """Find out, once, whether all members can map each other's memory: each opens what every other has exported."""
    within = link if link.levels is None else link.levels.local
    ways = within.ways
    while ways.is_asking:  # another exchange does
        yield None
    if not ways.can_map or ways.mapped is not None:
        return
    ways.is_asking = True
    try:
        token = bytes(TOKEN_NBYTES)
        try:
            token, why = ways.memory.token(device), ""
        except OSError as error:
            why = str(error)
        tokens = yield from gather_bytes(within, token, TOKEN_NBYTES, MAPPING_TAG)
        for peer, other in enumerate(tokens):
            if not why and peer != within.rank and any(other):
                problem = ways.memory.problem(other, device)
                why = f"of member {peer}: {problem}" if problem else ""
        told = yield from gather_words(within, why, MAPPING_TAG)
        ways.mapped = not any(told)
    finally:
        ways.is_asking = False
    if any(told) and within.rank == 0 and ways.nccl is None:
        _say(told)


def _say(told: Sequence[str]) -> None:
    rank, why = next((rank, reason) for rank, reason in enumerate(told) if reason)
    logger.warning(
        "the ranks of this node do not map each other's GPU memory, so gradients on GPUs go through host memory or "
        "MPI, which is slower: local rank %d could not map that %s. Where each rank sees its own GPU alone, let all "
        "see all (with Slurm's --gpus-per-task, add --gpu-bind=none); in containers, ranks need one PID and one IPC "
        "namespace",
        rank,
        why,
    )


def allreduce(link: Link, gpus: DeviceMemory, flat: torch.Tensor, op: ReduceOp, tag: int, scale: float = 1.0) -> Steps:
    """``flat`` becomes ``scale * (x_0 op ... op x_{p-1})``, combined in this order, on every rank."""
    bounds = aligned_cut(flat.numel(), link.size, flat.element_size())
    if flat.nbytes <= ONE_SHOT_NBYTES:

        def reduce(parts: Sequence[torch.Tensor], out: torch.Tensor) -> torch.Tensor | None:
            result = torch.empty_like(out) if parts[link.rank] is out else out  # peers still read the tensor itself
            reduce_parts(op, parts, [result], scale)
            return result

        return _exchange(link, gpus, flat, tag, reduce, is_back_in_place=False)

    def reduce_shard(parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        lo, hi = bounds[link.rank]
        shards = [part[lo:hi] for part in parts]
        reduce_parts(op, shards, shards, scale)

    return _exchange(link, gpus, flat, tag, reduce_shard)


def reduce_scatter(
    link: Link, gpus: DeviceMemory, flat: torch.Tensor, bounds: Bounds, op: ReduceOp, tag: int, scale: float = 1.0
) -> Steps:
    """``flat[slice(*bounds[r])]`` becomes the reduction of that chunk on rank r; the others are left as they are."""
    lo, hi = bounds[link.rank]

    def reduce(parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        reduce_parts(op, [part[lo:hi] for part in parts], [parts[link.rank][lo:hi]], scale)

    return _exchange(link, gpus, flat, tag, reduce)


def allgather(link: Link, gpus: DeviceMemory, flat: torch.Tensor, bounds: Bounds, tag: int) -> Steps:
    """Every rank's ``flat[slice(*bounds[r])]`` reaches all ranks."""

    def fetch(parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        for member, (lo, hi) in enumerate(bounds):
            if member != link.rank:
                _copy(parts[member][lo:hi], out[lo:hi])

    return _exchange(link, gpus, flat, tag, fetch, is_back_in_place=False)


def broadcast(link: Link, gpus: DeviceMemory, flat: torch.Tensor, root: int, tag: int) -> Steps:
    """``flat`` becomes what it is on ``root``, on every rank."""

    def fetch(parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        if link.rank != root:
            _copy(parts[root], out)

    return _exchange(link, gpus, flat, tag, fetch, is_back_in_place=False)


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """As bytes, by the kernel: torch would make a context on the device that a peer's memory lies on."""
    reduce_parts(ReduceOp.SUM, [source.view(torch.uint8)], [target.view(torch.uint8)])


def _exchange(
    link: Link,
    gpus: DeviceMemory,
    flat: torch.Tensor,
    tag: int,
    work: Callable[[Sequence[torch.Tensor], torch.Tensor], torch.Tensor | None],
    is_back_in_place: bool = True,
) -> Steps:
    """``work`` on all members' tensors between two meetings of the hosts.

    ``work(parts, out)``: ``out`` is this member's tensor itself, and ``parts[rank]`` what the peers see of it; where
    these are two, what comes of it lies in ``parts[rank]`` (``is_back_in_place``) or in ``out``. What it returns is
    copied to ``out`` when no peer reads that any more.
    """
    if not flat.numel():
        return
    device = link.ways.devices.of(flat)
    shown, record = flat, gpus.record(flat)
    if record is None:
        stage = _take_stage(link.ways, gpus, flat)
        shown = stage[: flat.nbytes].view(flat.dtype)
        shown.copy_(flat)
        record = gpus.record(shown)
        assert record is not None
    yield from _until_done(device)
    records = yield from gather_bytes(host_of(link), record, RECORD_NBYTES, tag)
    parts = [shown if member == link.rank else gpus.tensor(other, flat) for member, other in enumerate(records)]
    later = device.timed(lambda: work(parts, flat))
    yield from _until_done(device)
    yield from tree.barrier(host_of(link), tag)
    if later is not None and later is not flat:
        flat.copy_(later)
    elif shown is not flat and is_back_in_place:
        flat.copy_(shown)
    if shown is not flat:
        yield from _until_done(device)
        if stage.nbytes <= _KEPT_NBYTES:
            link.ways.stages.append(stage)


def _take_stage(ways: Ways, gpus: DeviceMemory, flat: torch.Tensor) -> torch.Tensor:
    """Memory on the device of ``flat`` that peers map and nobody uses, as bytes, of at least its size."""
    for at, stage in enumerate(ways.stages):
        if stage.device == flat.device and flat.nbytes <= stage.nbytes:
            return ways.stages.pop(at)
    return gpus.empty(flat.nbytes, torch.uint8, flat.device)


def _until_done(device: Device) -> Steps:
    """Until the exchange stream has done what is enqueued: the host can then say so to other processes."""
    event = device.exchange.record_event()
    while not event.query():
        yield None
