"""Reduce-scatter, all-gather, broadcast and all-to-all through memory that all ranks of a node map.

Where it is enough that the tensors of those who are read lie in such memory, and they do, each rank takes what it needs
from where it lies: one copy. Any other tensor goes through the owner's staging buffer in rounds: in round k each rank
stages the k-th piece of what each peer wants of it, and takes the k-th pieces of what it wants of them.

Cost: one step; every element is read once by each rank that wants it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..dtypes import scale_
from ..transport.node import Node
from ..transport.session import ARRIVED, STAGED, TAKEN, Session
from ..transport.steps import Steps, Until
from .base import Bounds, ReduceOp
from .mapped import BLOCK_NBYTES, block_numel
from .reduction import Reduction
from .shared_memory import STAGED_NBYTES, most_numel

__all__ = ["allgather", "allgather_in", "alltoall", "broadcast", "reduce_scatter", "reduce_scatter_in"]

#: Counted at the end, so that who still stages need not wait for a rank that wants nothing more.
_EVERYTHING = (1 << 24) - 1

#: Rounds that a rank may be ahead of its peers.
_DEPTH = 4

#: What happens to a piece that has come: (peer, where it begins in what this rank wants of it, the piece).
_Take = Callable[[int, int, torch.Tensor], None]


def reduce_scatter(node: Node, flat: torch.Tensor, bounds: Bounds, op: ReduceOp, tag: int, scale: float = 1.0) -> Steps:
    """``flat[slice(*bounds[r])]`` becomes the reduction of that chunk on rank r; the other chunks keep their content or
    lose it."""
    if node.size == 1:
        scale_(flat, scale)
        return
    with (yield from node.enter(tag)) as session:
        yield from reduce_scatter_in(session, flat, bounds, op, scale)


def reduce_scatter_in(session: Session, flat: torch.Tensor, bounds: Bounds, op: ReduceOp, scale: float = 1.0) -> Steps:
    """:func:`reduce_scatter` as a part of an exchange that goes on."""
    rank, size = session.rank, session.size
    numel = block_numel(BLOCK_NBYTES, flat.element_size())
    reduction = Reduction(op, flat.dtype, scale, size, most_numel(flat))
    lo, hi = bounds[rank]
    if (yield from _all_in_place(session, flat)):
        tensors = [flat if member == rank else session.tensor(member, flat) for member in range(size)]
        for at in range(lo, hi, numel):
            end = min(at + numel, hi)
            parts = [tensor[at:end] for tensor in tensors]
            reduction(parts, parts[rank])
    else:
        pieces: dict[int, torch.Tensor] = {}

        def take(peer: int, at: int, piece: torch.Tensor) -> None:
            pieces[peer] = piece
            if len(pieces) == size - 1:
                pieces[rank] = flat[lo + at : lo + at + piece.numel()]
                reduction([pieces[member] for member in range(size)], pieces[rank])
                pieces.clear()

        yield from _rounds(session, flat, bounds, [hi - lo] * size, take)
    session.count(TAKEN, _EVERYTHING)
    yield from session.wait(TAKEN, _EVERYTHING)  # the peers read this rank's tensor


def allgather(node: Node, flat: torch.Tensor, bounds: Bounds, tag: int) -> Steps:
    """Every rank's ``flat[slice(*bounds[r])]`` reaches all ranks; chunks may differ in length."""
    if node.size == 1:
        return
    with (yield from node.enter(tag)) as session:
        yield from allgather_in(session, flat, bounds)


def allgather_in(session: Session, flat: torch.Tensor, bounds: Bounds) -> Steps:
    """:func:`allgather` as a part of an exchange that goes on."""
    if (yield from _all_in_place(session, flat)):
        for peer in session.peers:
            lo, hi = bounds[peer]
            flat[lo:hi].copy_(session.tensor(peer, flat)[lo:hi])
    else:

        def take(peer: int, at: int, piece: torch.Tensor) -> None:
            begin = bounds[peer][0] + at
            flat[begin : begin + piece.numel()].copy_(piece)

        lengths = [hi - lo for lo, hi in bounds]
        yield from _rounds(session, flat, [bounds[session.rank]] * session.size, lengths, take, is_same_for_all=True)
    session.count(TAKEN, _EVERYTHING)
    yield from session.wait(TAKEN, _EVERYTHING)


def broadcast(node: Node, flat: torch.Tensor, root: int, tag: int) -> Steps:
    """``flat`` becomes what it is on ``root``, on every rank."""
    if node.size == 1 or flat.numel() == 0:
        return
    everything, nothing = (0, flat.numel()), (0, 0)
    with (yield from node.enter(tag)) as session:
        if node.rank == root:
            session.show(flat)
            session.count(ARRIVED, 1)
        while node.rank != root and not session.has(root, ARRIVED, 1):
            yield None
        if session.is_shown(root):  # where the others' tensors lie makes no difference
            if node.rank != root:
                flat.copy_(session.tensor(root, flat))
        else:

            def take(peer: int, at: int, piece: torch.Tensor) -> None:
                flat[at : at + piece.numel()].copy_(piece)

            own = everything if node.rank == root else nothing
            lengths = [flat.numel() if member == root and node.rank != root else 0 for member in range(node.size)]
            yield from _rounds(session, flat, [own] * node.size, lengths, take, is_same_for_all=True)
        session.count(TAKEN, _EVERYTHING)
        if node.rank == root:
            yield from session.wait(TAKEN, _EVERYTHING)


def alltoall(
    node: Node, source: torch.Tensor, outgoing: Bounds, target: torch.Tensor, incoming: Bounds, tag: int
) -> Steps:
    """``source[slice(*outgoing[r])]`` reaches rank r; what rank r sends here lands in
    ``target[slice(*incoming[r])]``."""
    rank = node.rank
    (lo, hi), (start, end) = outgoing[rank], incoming[rank]
    target[start:end] = source[lo:hi]
    if node.size == 1:
        return

    def take(peer: int, at: int, piece: torch.Tensor) -> None:
        begin = incoming[peer][0] + at
        target[begin : begin + piece.numel()].copy_(piece)

    with (yield from node.enter(tag)) as session:
        yield from _rounds(session, source, outgoing, [stop - begin for begin, stop in incoming], take)
        session.count(TAKEN, _EVERYTHING)


def _all_in_place(session: Session, flat: torch.Tensor) -> Until[bool]:
    """Whether all tensors can be mapped; waits for the peers only where this rank's own can be."""
    is_shown = session.show(flat)
    session.count(ARRIVED, 1)
    if not is_shown:
        return False
    yield from session.wait(ARRIVED, 1)
    return session.all_shown()


def _rounds(
    session: Session,
    source: torch.Tensor,
    outgoing: Bounds,
    lengths: Sequence[int],
    take: _Take,
    is_same_for_all: bool = False,
) -> Steps:
    """Hand ``source[slice(*outgoing[r])]`` to each peer r, and ``lengths[r]`` elements of each to ``take``.

    With ``is_same_for_all`` every peer gets the same range, which is staged once.
    """
    size = session.size
    stage = session.stage(_DEPTH * STAGED_NBYTES)
    per_round = block_numel(STAGED_NBYTES, source.element_size())
    # What a peer gets in a round, in elements: at multiples of it lie the pieces of the members.
    numel = per_round if is_same_for_all else per_round // size
    peers = session.peers
    wanted = [peer for peer in peers if lengths[peer]]
    to_stage = max((-(-(outgoing[peer][1] - outgoing[peer][0]) // numel) for peer in peers), default=0)
    to_take = max((-(-lengths[peer] // numel) for peer in wanted), default=0)
    room = stage.view(source.dtype)
    rooms: dict[int, torch.Tensor] = {}
    staged = taken = 0
    while staged < to_stage or taken < to_take:
        moved = False
        if taken < to_take and (staged > taken or staged == to_stage):
            there = [peer for peer in wanted if taken * numel < lengths[peer]]
            if all(session.has(peer, STAGED, taken + 1) for peer in there):
                at = taken * numel
                for peer in there:
                    if peer not in rooms:
                        rooms[peer] = session.peer_stage(peer, stage.nbytes).view(source.dtype)
                    begin = taken % _DEPTH * per_round + (0 if is_same_for_all else session.rank * numel)
                    take(peer, at, rooms[peer][begin : begin + min(numel, lengths[peer] - at)])
                taken += 1
                session.count(TAKEN, taken)
                moved = True
        if not moved and staged < to_stage and (staged < _DEPTH or session.have(TAKEN, staged - _DEPTH + 1)):
            for peer in peers[:1] if is_same_for_all else peers:
                lo, hi = outgoing[peer]
                lo, begin = lo + staged * numel, staged % _DEPTH * per_round + (0 if is_same_for_all else peer * numel)
                if lo < hi:
                    piece = source[lo : min(lo + numel, hi)]
                    room[begin : begin + piece.numel()].copy_(piece)
            staged += 1
            session.count(STAGED, staged)
            moved = True
        if taken == to_take and staged < to_stage:
            session.count(TAKEN, _EVERYTHING)
        if not moved:
            yield staged + taken
