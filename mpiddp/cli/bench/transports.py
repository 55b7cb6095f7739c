"""What carries tensors of GPUs where ranks do not map each other's memory, beside the copies that bound it.

Each rank sends a tensor to the next one and gets one from the rank before it, at the same time: staged through pinned
host memory, and by a CUDA-aware MPI. A staged transfer cannot be faster than the slowest of what it is made of: copies
between device and host in both directions at once, and a copy within the host's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ... import runtime
from ...engine import Lane
from ...engine.device import How, launch
from ...errors import CollectiveError
from ...ops.submit import wait_for
from ...transport.base import Link, Steps
from ...transport.device import CUDA_AWARE, STAGED
from .accelerator import Accelerator
from .contenders import Contender

__all__ = ["ONE_WAY", "TO_HOST", "shift", "transports"]

#: The names of what a transfer is to be compared with, and of transfers.
TO_HOST = "copy to host"
ONE_WAY = {STAGED: "p2p staged", CUDA_AWARE: "p2p cuda-aware"}


def shift(link: Link, flat: torch.Tensor, tag: int) -> Steps:
    """The first half of ``flat`` goes to the next member, the second half comes from the one before."""
    region, half = link.open(flat), flat.numel() // 2
    under_way = [
        region.recv(half, 2 * half, (link.rank - 1) % link.size, tag),
        region.send(0, half, (link.rank + 1) % link.size, tag),
    ]
    while under_way:
        under_way = [pending for pending in under_way if not pending()]
        if under_way:
            yield None


def transports(gpu: Accelerator, lane: Lane, numel: int, dtype: torch.dtype, is_aware: bool) -> list[Contender]:
    """Whom to time with tensors of ``numel``; checks each transport once. ``is_aware``: MPI takes device pointers.
    Collective."""
    near = torch.zeros(2 * numel, dtype=dtype, device=gpu.device)
    far = [gpu.pinned(numel, dtype) for _ in range(2)]

    def both_ways() -> None:
        far[0].copy_(near[:numel], non_blocking=True)
        with gpu.beside():
            near[numel:].copy_(far[1], non_blocking=True)

    def contender(name: str, run: Callable[[], object]) -> Contender:
        return Contender(name, lambda _: run, op="copy", is_fresh=False, make=lambda *_, **__: near)

    found = [
        contender(TO_HOST, lambda: far[0].copy_(near[:numel], non_blocking=True)),
        contender("copy both ways", both_ways),
        contender("copy in host", lambda: far[0].copy_(far[1])),
    ]
    if lane.link.size > 1:
        for way in (STAGED, CUDA_AWARE) if is_aware else (STAGED,):
            send = partial(_by, way, lane, near)
            _check(gpu, lane.link, near, send, ONE_WAY[way])
            found.append(contender(ONE_WAY[way], send))
    return found


def _by(way: str, lane: Lane, flat: torch.Tensor) -> None:
    """One exchange by this way, whatever the usual one is. Collective."""
    ways = lane.link.ways
    usual, ways.way_to = ways.way_to, lambda _: way
    try:
        wait_for(launch(lane, f"bench.{way}", flat, shift, How.PIECES))
    finally:
        ways.way_to = usual


def _check(gpu: Accelerator, link: Link, near: torch.Tensor, send: Callable[[], None], name: str) -> None:
    """CollectiveError where something else comes than was sent."""
    half, before = near.numel() // 2, (link.rank - 1) % link.size
    near.copy_(torch.tensor([link.rank % 100, 101], dtype=near.dtype).repeat_interleave(half))
    send()
    gpu.wait()
    came = near[half:].cpu()
    if not bool((came == before % 100).all()):
        rank = runtime.rank()
        raise CollectiveError(
            f"{name} brought {came[0].item()} to {came[-1].item()} to rank {rank} in place of {before % 100}"
        )
