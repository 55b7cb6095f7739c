"""From a run to an exchange: pack what is fused, choose the algorithm, deliver the results."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from ..collectives import adasum, select, tree
from ..collectives.base import Bounds, ReduceOp, chunk_bounds
from ..dtypes import dtype_called
from ..trace import span
from ..transport.base import Link, Steps
from .member import Run
from .request import Kind, Request, Signature

__all__ = ["exchange", "phantom", "through_host"]


def phantom(signature: Signature) -> Request:
    """What a rank that has joined contributes to a reduction that it knows nothing of: zeros."""
    zeros = torch.zeros(signature.shape, dtype=dtype_called(signature.dtype)).view(-1)
    return Request("joined", signature, zeros)


def exchange(link: Link, ranks: Sequence[int], run: Run, tag: int, segment_nbytes: int) -> Steps:
    """The exchange of a run; when it ends, its requests are done. ``ranks`` are the members' world ranks."""
    kind = run.requests[0].signature.kind
    if kind == Kind.ALLGATHER:
        return _gather(link, run, tag, segment_nbytes)
    if kind == Kind.ALLTOALL:
        return _alltoall(link, run, tag)
    if kind == Kind.REDUCESCATTER:
        return _reduce_scatter(link, run, tag, segment_nbytes)
    if kind == Kind.BARRIER:
        return _deliver(tree.barrier(link, tag), run.requests)
    requests = run.requests
    flat = requests[0].flat if len(requests) == 1 else _pack(link, requests)
    signature = requests[0].signature
    if kind == Kind.BROADCAST:
        root = ranks.index(signature.root)
        steps = through_host(flat, lambda host: select.broadcast(link, host, root, tag))
    else:
        steps = through_host(flat, lambda host: reduction(link, host, signature, tag, segment_nbytes))
    return _deliver(steps, requests) if len(requests) == 1 else _unpack(link, steps, requests, flat)


def reduction(link: Link, flat: torch.Tensor, signature: Signature, tag: int, segment_nbytes: int) -> Steps:
    """The all-reduce that ``signature`` asks for."""
    if signature.op == ReduceOp.ADASUM:
        return adasum.allreduce(link, flat, tag, signature.scale)
    return select.allreduce(link, flat, ReduceOp(signature.op), tag, signature.scale, segment_nbytes)


def through_host(flat: torch.Tensor, start: Callable[[torch.Tensor], Steps]) -> Steps:
    """The exchange ``start(flat)``, by way of a copy in host memory where ``flat`` lies on another device."""
    if flat.is_cpu:
        return start(flat)
    host = flat.cpu()  # waits for the device
    return _copied_back(start(host), host, flat)


def _copied_back(steps: Steps, host: torch.Tensor, flat: torch.Tensor) -> Steps:
    yield from steps
    flat.copy_(host)


def _deliver(steps: Steps, requests: list[Request]) -> Steps:
    with span("exchange", name=requests[0].name, of=requests):
        yield from steps
    for request in requests:
        request.complete(request.flat)


def _pack(link: Link, requests: list[Request]) -> torch.Tensor:
    """One tensor of all, in memory that the members share where that is to be had."""
    flats = [request.flat for request in requests]
    with span("pack", name=requests[0].name, of=requests):
        numel, like = sum(flat.numel() for flat in flats), flats[0]
        room = link.node.lend(numel * like.element_size()) if link.node and like.device.type == "cpu" else None
        if room is None:
            return torch.cat(flats)
        fused = room.view(like.dtype)[:numel]
        return torch.cat(flats, out=fused)


def _unpack(link: Link, steps: Steps, requests: list[Request], fused: torch.Tensor) -> Steps:
    with span("exchange", name=requests[0].name, of=requests):
        yield from steps
    with span("unpack", name=requests[0].name, of=requests):
        pieces = torch.split(fused, [request.flat.numel() for request in requests])
        torch._foreach_copy_([request.flat for request in requests], list(pieces))
    if link.node is not None:
        link.node.take_back(fused)
    for request in requests:
        request.complete(request.flat)


def _row_bounds(rows: Sequence[int], shape: Sequence[int]) -> Bounds:
    """The element ranges of consecutive blocks of so many rows each."""
    row_numel = 1
    for length in shape:
        row_numel *= length
    ends = list(itertools.accumulate(row * row_numel for row in rows))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _gather(link: Link, run: Run, tag: int, segment_nbytes: int) -> Steps:
    """All-gather along dim 0; every rank knows every rank's rows from the run list."""
    (request,) = run.requests
    rows = [extent[0] for extent in run.extents]
    bounds = _row_bounds(rows, request.signature.shape)
    gathered = request.flat.new_empty(bounds[-1][1])
    lo, hi = bounds[link.rank]
    gathered[lo:hi] = request.flat
    request.flat = gathered.view(sum(rows), *request.signature.shape)
    steps = through_host(gathered, lambda host: select.allgather(link, host, bounds, tag, segment_nbytes))
    return _deliver(steps, [request])


def _alltoall(link: Link, run: Run, tag: int) -> Steps:
    """Each rank's extent lists the rows that it sends to each member. Delivers the rows, and how many came from
    whom."""
    (request,) = run.requests
    shape = request.signature.shape
    incoming_rows = [extent[link.rank] for extent in run.extents]
    outgoing, incoming = _row_bounds(request.extent, shape), _row_bounds(incoming_rows, shape)
    source = request.flat.cpu()
    target = source.new_empty(incoming[-1][1])
    device = request.flat.device
    return _delivering(
        select.alltoall(link, source, outgoing, target, incoming, tag),
        request,
        lambda: (target.to(device).view(sum(incoming_rows), *shape), torch.tensor(incoming_rows, dtype=torch.int32)),
    )


def _reduce_scatter(link: Link, run: Run, tag: int, segment_nbytes: int) -> Steps:
    """Along dim 0; the first ranks take one row more where it does not divide."""
    (request,) = run.requests
    signature = request.signature
    bounds = _row_bounds([hi - lo for lo, hi in chunk_bounds(signature.shape[0], link.size)], signature.shape[1:])
    lo, hi = bounds[link.rank]
    rows, flat = chunk_bounds(signature.shape[0], link.size)[link.rank], request.flat
    op, scale = ReduceOp(signature.op), signature.scale
    steps = through_host(flat, lambda host: select.reduce_scatter(link, host, bounds, op, tag, scale, segment_nbytes))
    return _delivering(steps, request, lambda: flat[lo:hi].view(rows[1] - rows[0], *signature.shape[1:]).clone())


def _delivering(steps: Steps, request: Request, result: Callable[[], object]) -> Steps:
    with span("exchange", name=request.name, of=(request,)):
        yield from steps
    request.complete(result())
