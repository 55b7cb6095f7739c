"""From a run to an exchange: pack what is fused, choose the algorithm, deliver the results."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from ..collectives import adasum, select, tree
from ..collectives.base import Bounds, ReduceOp, chunk_bounds
from ..dtypes import dtype_called
from ..errors import CollectiveError
from ..trace import span
from ..transport.base import Link, Steps
from .device import How, Over, Start, carried, depart, placed
from .member import Run
from .request import Kind, Request, Signature

__all__ = ["exchange", "phantom"]


def phantom(link: Link, signature: Signature) -> Request:
    """What a rank that has joined contributes to a reduction that it knows nothing of: zeros."""
    device = signature.device if signature.device == "cpu" else link.ways.devices.home
    zeros = torch.zeros(signature.shape, dtype=dtype_called(signature.dtype), device=device).view(-1)
    request = Request("joined", signature, zeros)
    request.passage = depart(link, zeros)
    return request


def exchange(link: Link, ranks: Sequence[int], run: Run, tag: int, segment_nbytes: int) -> Steps:
    """The exchange of a run; when it ends, its requests are done. ``ranks`` are the members' world ranks."""
    first = run.requests[0]
    if first.passage is None:
        if first.signature.device != "cpu":
            raise CollectiveError(
                f"tensor {first.name!r} lies on {first.signature.device!r}; only what lies on the CPU or on CUDA is "
                "exchanged: move it there first"
            )
        return _exchange(link, ranks, run, tag, segment_nbytes, _direct)
    passages = [request.passage for request in run.requests if request.passage is not None]
    return carried(passages, lambda: _exchange(link, ranks, run, tag, segment_nbytes, placed))


def _direct(link: Link, flat: torch.Tensor, start: Start, how: How = How.BY_SIZE) -> Steps:
    return start(link, flat)


def _exchange(link: Link, ranks: Sequence[int], run: Run, tag: int, segment_nbytes: int, over: Over) -> Steps:
    """``over(link, flat, start)`` is the exchange ``start`` of a tensor, wherever that lies."""
    kind = run.requests[0].signature.kind
    if kind == Kind.ALLGATHER:
        return _gather(link, run, tag, segment_nbytes, over)
    if kind == Kind.ALLTOALL:
        return _alltoall(link, run, tag, over)
    if kind == Kind.REDUCESCATTER:
        return _reduce_scatter(link, run, tag, segment_nbytes, over)
    if kind == Kind.BARRIER:
        return _deliver(tree.barrier(link, tag), run.requests)
    requests = run.requests
    flat = requests[0].flat if len(requests) == 1 else _pack(link, requests)
    signature = requests[0].signature
    if kind == Kind.BROADCAST:
        root = ranks.index(signature.root)
        steps = over(link, flat, lambda link, flat: select.broadcast(link, flat, root, tag))
    else:
        # Adasum needs the values of dot products between its steps.
        how = How.WHOLE if signature.op == ReduceOp.ADASUM else How.BY_SIZE
        steps = over(link, flat, lambda link, flat: reduction(link, flat, signature, tag, segment_nbytes), how)
    return _deliver(steps, requests) if len(requests) == 1 else _unpack(link, steps, requests, flat)


def reduction(link: Link, flat: torch.Tensor, signature: Signature, tag: int, segment_nbytes: int) -> Steps:
    """The all-reduce that ``signature`` asks for."""
    if signature.op == ReduceOp.ADASUM:
        return adasum.allreduce(link, flat, tag, signature.scale)
    return select.allreduce(link, flat, ReduceOp(signature.op), tag, signature.scale, segment_nbytes)


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
            return torch.cat(flats) if len({flat.device for flat in flats}) == 1 else _pack_devices(flats, numel)
        fused = room.view(like.dtype)[:numel]
        return torch.cat(flats, out=fused)


def _pack_devices(flats: list[torch.Tensor], numel: int) -> torch.Tensor:
    """On the first one's device. What is one device here may be several on another rank, so all are fused alike."""
    fused = flats[0].new_empty(numel)
    for piece, flat in zip(torch.split(fused, [flat.numel() for flat in flats]), flats, strict=True):
        piece.copy_(flat)
    return fused


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


def _gather(link: Link, run: Run, tag: int, segment_nbytes: int, over: Over) -> Steps:
    """All-gather along dim 0; every rank knows every rank's rows from the run list."""
    (request,) = run.requests
    rows = [extent[0] for extent in run.extents]
    bounds = _row_bounds(rows, request.signature.shape)
    gathered = request.flat.new_empty(bounds[-1][1])
    lo, hi = bounds[link.rank]
    gathered[lo:hi] = request.flat
    request.flat = gathered.view(sum(rows), *request.signature.shape)
    steps = over(link, gathered, lambda link, flat: select.allgather(link, flat, bounds, tag, segment_nbytes))
    return _deliver(steps, [request])


def _alltoall(link: Link, run: Run, tag: int, over: Over) -> Steps:
    """Each rank's extent lists the rows that it sends to each member. Delivers the rows, and how many came from
    whom."""
    (request,) = run.requests
    shape = request.signature.shape
    incoming_rows = [extent[link.rank] for extent in run.extents]
    outgoing, incoming = _row_bounds(request.extent, shape), _row_bounds(incoming_rows, shape)
    source = request.flat
    target = source.new_empty(incoming[-1][1])

    def start(link: Link, source: torch.Tensor) -> Steps:
        return select.alltoall(link, source, outgoing, target, incoming, tag)

    return _delivering(
        over(link, source, start, How.PIECES),  # the ranks' tensors differ in size
        request,
        lambda: (target.view(sum(incoming_rows), *shape), torch.tensor(incoming_rows, dtype=torch.int32, device="cpu")),
    )


def _reduce_scatter(link: Link, run: Run, tag: int, segment_nbytes: int, over: Over) -> Steps:
    """Along dim 0; the first ranks take one row more where it does not divide."""
    (request,) = run.requests
    signature = request.signature
    bounds = _row_bounds([hi - lo for lo, hi in chunk_bounds(signature.shape[0], link.size)], signature.shape[1:])
    lo, hi = bounds[link.rank]
    rows, flat = chunk_bounds(signature.shape[0], link.size)[link.rank], request.flat
    op, scale = ReduceOp(signature.op), signature.scale

    def start(link: Link, flat: torch.Tensor) -> Steps:
        return select.reduce_scatter(link, flat, bounds, op, tag, scale, segment_nbytes)

    steps = over(link, flat, start)
    return _delivering(steps, request, lambda: flat[lo:hi].view(rows[1] - rows[0], *signature.shape[1:]).clone())


def _delivering(steps: Steps, request: Request, result: Callable[[], object]) -> Steps:
    with span("exchange", name=request.name, of=(request,)):
        yield from steps
    request.complete(result())
