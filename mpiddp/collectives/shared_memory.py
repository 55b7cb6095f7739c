"""All-reduce through memory that all ranks of a node map. Each element is computed by one rank and copied to the
others, or by every rank in the same order: all get the same bits.

Where every rank's tensor lies in such memory, rank r owns chunk r: block by block it adds its peers' blocks to its own
and writes the result into theirs while it is in the cache. 2(p-1) n/p elements pass between the ranks, as in a ring, in
two steps whatever p is; for two ranks the memory's traffic is two thirds of that of ``x.add_(y)``.

Any other tensor goes through staging buffers that stay in the cache. *Direct*: every rank stages its blocks and adds
all the others' (one step, pn elements read: small tensors, and two ranks). *Chunked*: of each block rank r reduces the
r-th part, and all take the parts from their owners.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from ..dtypes import scale_
from ..transport import depth
from ..transport.base import Steps
from ..transport.node import Node
from ..transport.session import ARRIVED, REDUCED, STAGED, TAKEN, Session
from . import mapped
from .base import ReduceOp
from .blocks import Blocks, blocks_of
from .mapped import BLOCK_NBYTES, aligned_cut, block_numel
from .reduction import may_scale_first

__all__ = ["DIRECT_NBYTES", "STAGED_NBYTES", "allreduce", "allreduce_in", "is_to_be_shown", "most_numel"]

#: What is staged at once, and of long tensors, where a block more at the beginning does not count.
STAGED_NBYTES, LONG_STAGED_NBYTES = 256 << 10, 512 << 10
_LONG_NBYTES = 8 << 20

#: Tensors up to here, and with no more than that to read from all peers together, go the direct way wherever they lie:
#: it has one step. Measured at 2 ranks on 2 cores (24 us at 128 KiB, 31 in place) and 4 (102 us at 256 KiB, 128).
DIRECT_NBYTES = 192 << 10
_DIRECT_READ_NBYTES = 1 << 20

#: The same for tensors that have to be staged anyway (4 ranks on 2 cores: 339 us at 1 MiB, against 456 in pieces).
STAGED_READ_NBYTES = 4 << 20
_SMALL_NBYTES = 32 << 10


def allreduce(
    node: Node, flat: torch.Tensor, op: ReduceOp, tag: int, scale: float = 1.0, is_ordered: bool = False
) -> Steps:
    """``flat`` becomes ``scale * (x_0 op x_1 op ... op x_{p-1})`` on every rank, bit for bit the same.

    ``is_ordered``: the same bits for subnormal numbers and at the edge of overflow, too, as if nothing was staged.
    """
    if node.size == 1 or flat.numel() == 0:
        scale_(flat, scale)
        return
    with (yield from node.enter(tag)) as session:
        yield from allreduce_in(session, flat, op, scale, is_ordered)


def allreduce_in(
    session: Session,
    flat: torch.Tensor,
    op: ReduceOp,
    scale: float = 1.0,
    is_ordered: bool = False,
    unshown: Callable[[], Steps] | None = None,
) -> Steps:
    """:func:`allreduce` as a part of an exchange that goes on. ``unshown``: another way for a tensor that is to be
    shown, where not all members can map each other's."""
    size, numel = session.size, min(flat.numel(), most_numel(flat))
    is_small = not is_to_be_shown(flat, size)
    is_direct = (is_small or _reads_all(size, flat)) and not is_ordered
    first = scale if is_direct and may_scale_first(op, flat.dtype, scale) else 1.0
    if is_small:
        return _small(session, flat, blocks_of(flat, op, scale, first, size, numel))
    return _large(session, flat, lambda first: blocks_of(flat, op, scale, first, size, numel), first, unshown)


def is_to_be_shown(flat: torch.Tensor, size: int) -> bool:
    """Whether members tell each other where their tensors lie, since they need not be staged if all can be mapped."""
    return flat.nbytes > DIRECT_NBYTES or flat.nbytes * (size - 1) > _DIRECT_READ_NBYTES


def most_numel(flat: torch.Tensor) -> int:
    """The length of the longest block that is reduced at once."""
    return block_numel(max(BLOCK_NBYTES, STAGED_NBYTES, LONG_STAGED_NBYTES), flat.element_size())


def _reads_all(size: int, flat: torch.Tensor) -> bool:
    """Whether every rank adds all of what is staged, and not its part alone."""
    return size == 2 or flat.nbytes * (size - 1) <= STAGED_READ_NBYTES


def _small(session: Session, flat: torch.Tensor, blocks: Blocks) -> Steps:
    nbytes = _SMALL_NBYTES if flat.nbytes <= _SMALL_NBYTES else depth.SHALLOW_NBYTES
    if flat.numel() > most_numel(flat):
        yield from _direct(_Staging(session, flat, blocks, most_numel(flat)))
        return
    stage = session.stage(nbytes)
    whole, own = blocks.flat(flat), blocks.flat(stage[: flat.nbytes].view(flat.dtype))
    blocks.stage(whole, own)
    session.count(STAGED, 1)
    yield from session.wait(STAGED, 1)
    parts = [
        own if member == session.rank else blocks.seen(session.staged(member, flat.nbytes))
        for member in range(session.size)
    ]
    blocks.reduce(parts, whole)


def _large(
    session: Session,
    flat: torch.Tensor,
    blocks: Callable[[float], Blocks],
    first: float,
    unshown: Callable[[], Steps] | None,
) -> Steps:
    is_shown = session.show(flat)
    session.count(ARRIVED, 1)
    if is_shown:  # a rank whose tensor is not need not wait to know that not all are
        whole = blocks(1.0)
        yield from session.wait(ARRIVED, 1)
        if session.all_shown():
            yield from mapped.allreduce_in(session, flat, whole)
            return
    if unshown is not None:
        yield from unshown()
        return
    at_once = STAGED_NBYTES if flat.nbytes < _LONG_NBYTES else LONG_STAGED_NBYTES
    numel = block_numel(at_once, flat.element_size())
    if _reads_all(session.size, flat):
        yield from _direct(_Staging(session, flat, blocks(first), numel))
    else:
        yield from _chunked(_Staging(session, flat, blocks(1.0), numel))


class _Staging:
    """An exchange of blocks of ``numel`` elements at most through the members' staging buffers.

    This member is at most as many blocks ahead of its peers as its buffer is deep; each chooses for itself.
    """

    def __init__(self, session: Session, flat: torch.Tensor, blocks: Blocks, numel: int) -> None:
        self.session, self.flat, self.blocks, self.numel = session, flat, blocks, numel
        self.pieces = blocks.split(blocks.flat(flat), numel)
        self.staged = 0
        self._is_measured = flat.nbytes > 2 * depth.SHALLOW_NBYTES
        self._nbytes = session.depth.choose() if self._is_measured else depth.SHALLOW_NBYTES
        stage = blocks.flat(session.stage(self._nbytes).view(flat.dtype))
        self._depth = len(stage) // numel
        self._own = _rooms(blocks, stage, flat, numel)
        self._fresh = depth.SHALLOW_NBYTES // flat.element_size() // numel  # blocks where nothing has been read yet
        self._spent_s = 0.0

    def may_stage(self, taken: int) -> bool:
        """Whether there is another block, and room for it, where this member has taken so many from the others."""
        staged, depth = self.staged, self._depth
        return staged < min(len(self.pieces), taken + depth) and (
            staged < depth or self.session.have(TAKEN, staged - depth + 1)
        )

    def stage(self) -> None:
        """Stage the next block."""
        began_s = perf_counter()
        self.blocks.stage(self.pieces[self.staged], self._own(self.staged))
        if self.staged >= self._fresh:
            self._spent_s += perf_counter() - began_s
        self.staged += 1
        self.session.count(STAGED, self.staged)

    def rooms(self) -> list[_Rooms]:
        """Where each member's blocks lie, once all peers have staged something."""
        return [
            self._own if member == self.session.rank else self._peers(member) for member in range(self.session.size)
        ]

    def _peers(self, peer: int) -> _Rooms:
        content = self.session.staged(peer, self.session.staged_nbytes(peer))
        return _rooms(self.blocks, self.blocks.seen(content), self.flat, self.numel)

    def end(self) -> None:
        """All is done: remember what it cost."""
        if self._is_measured:
            numel = self.flat.numel() - self._fresh * self.numel
            self.session.depth.note(self._nbytes, self._spent_s / (numel * self.flat.element_size()))


def _direct(staging: _Staging) -> Steps:
    """Blocks are scaled by ``blocks.first`` on their way into the staging buffer.

    What has been staged is reduced first, while it is in the cache; only who would wait stages ahead.
    """
    session, blocks, pieces, rank = staging.session, staging.blocks, staging.pieces, staging.session.rank
    rooms: list[_Rooms] = []
    taken = 0
    while taken < len(pieces):
        if taken < staging.staged and session.have(STAGED, taken + 1):
            rooms = rooms or staging.rooms()
            block = pieces[taken]
            parts = [each(taken) for each in rooms]
            if blocks.first == 1.0:
                parts[rank] = block
            blocks.reduce(parts, block)
            taken += 1
            session.count(TAKEN, taken)
        elif staging.may_stage(taken):
            staging.stage()
        else:
            yield staging.staged + taken
    staging.end()


def _chunked(staging: _Staging) -> Steps:
    """As :func:`_direct`, but each rank reduces its part of each block only, in its own staging buffer."""
    session, blocks, pieces, flat = staging.session, staging.blocks, staging.pieces, staging.flat
    rooms: list[_Rooms] = []
    reduced = taken = 0
    while taken < len(pieces):
        if taken < reduced and session.have(REDUCED, taken + 1):
            block = pieces[taken]
            for owner, (lo, hi) in enumerate(aligned_cut(len(block), session.size, flat.element_size())):
                blocks.copy(rooms[owner](taken)[lo:hi], block[lo:hi])
            taken += 1
            session.count(TAKEN, taken)
        elif reduced < staging.staged and session.have(STAGED, reduced + 1):
            rooms = rooms or staging.rooms()
            lo, hi = aligned_cut(len(pieces[reduced]), session.size, flat.element_size())[session.rank]
            if lo < hi:
                parts = [each(reduced)[lo:hi] for each in rooms]
                blocks.reduce(parts, parts[session.rank])
            reduced += 1
            session.count(REDUCED, reduced)
        elif staging.may_stage(taken):
            staging.stage()
        else:
            yield staging.staged + reduced + taken
    staging.end()


_Rooms = Callable[[int], Any]


def _rooms(blocks: Blocks, stage: Any, flat: torch.Tensor, numel: int) -> _Rooms:
    """Where in a staging buffer a block of so many elements of ``flat`` has its place."""
    number_of_blocks = -(-flat.numel() // numel)
    last, depth = number_of_blocks - 1, len(stage) // numel
    places = blocks.split(stage[: numel * min(depth, number_of_blocks)], numel)
    place_of_last = places[last % depth][: flat.numel() - last * numel]
    return lambda number: places[number % depth] if number < last else place_of_last
