"""From a run to an exchange: pack what is fused, choose the algorithm, deliver the results."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from ..collectives import ring, select, tree
from ..collectives.base import ReduceOp
from ..transport.base import Link, Steps
from .negotiate import Run
from .request import Kind, Request

__all__ = ["exchange", "through_host"]


def exchange(link: Link, run: Run, tag: int, segment_nbytes: int) -> Steps:
    """The exchange of a run; when it ends, the handles of its requests are done."""
    kind = Kind(run.requests[0].signature.kind)
    if kind is Kind.ALLGATHER:
        return _gather(link, run, tag, segment_nbytes)
    if kind is Kind.BARRIER:
        return _deliver(tree.barrier(link, tag), run.requests)
    requests = run.requests
    flat = requests[0].flat if len(requests) == 1 else torch.cat([request.flat for request in requests])
    signature = requests[0].signature
    if kind is Kind.BROADCAST:
        steps = through_host(flat, lambda host: tree.broadcast(link, host, signature.root, tag))
    else:
        op, scale = ReduceOp(signature.op), signature.scale
        steps = through_host(flat, lambda host: select.allreduce(link, host, op, tag, scale, segment_nbytes))
    return _deliver(steps, requests) if len(requests) == 1 else _unpack(steps, requests, flat)


def through_host(flat: torch.Tensor, start: Callable[[torch.Tensor], Steps]) -> Steps:
    """The exchange ``start(flat)``, by way of a copy in host memory where ``flat`` lies on another device."""
    if flat.device.type == "cpu":
        return start(flat)
    host = flat.cpu()  # waits for the device
    return _copied_back(start(host), host, flat)


def _copied_back(steps: Steps, host: torch.Tensor, flat: torch.Tensor) -> Steps:
    yield from steps
    flat.copy_(host)


def _deliver(steps: Steps, requests: list[Request]) -> Steps:
    yield from steps
    for request in requests:
        request.handle.finish(request.deliver(request.flat))


def _unpack(steps: Steps, requests: list[Request], fused: torch.Tensor) -> Steps:
    yield from steps
    pieces = torch.split(fused, [request.flat.numel() for request in requests])
    torch._foreach_copy_([request.flat for request in requests], list(pieces))
    for request in requests:
        request.handle.finish(request.deliver(request.flat))


def _gather(link: Link, run: Run, tag: int, segment_nbytes: int) -> Steps:
    """All-gather along dim 0; every rank knows every rank's extent from the run list."""
    (request,) = run.requests
    rows = [extent[0] for extent in run.extents]
    row_numel = 1
    for length in request.signature.shape:
        row_numel *= length
    ends = list(itertools.accumulate(row * row_numel for row in rows))
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))
    gathered = request.flat.new_empty(ends[-1])
    lo, hi = bounds[link.rank]
    gathered[lo:hi] = request.flat
    request.flat = gathered.view(sum(rows), *request.signature.shape)
    return _deliver(
        through_host(gathered, lambda host: ring.allgather(link, host, bounds, tag, segment_nbytes)), [request]
    )
