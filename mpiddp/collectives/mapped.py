"""All-reduce of tensors that every rank of a node maps: rank r owns chunk r, adds its peers' to it block by block and
writes each block into theirs while it is in the cache. See :mod:`~mpiddp.collectives.shared_memory`.

2(p-1) n/p elements pass between the ranks, in two steps whatever p is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from ..dtypes import name_of
from ..transport.base import Steps
from ..transport.session import REDUCED, Session
from .base import ReduceOp, cut
from .blocks import Blocks
from .reduction import ArrayReduction, Reduction, numpy_can

__all__ = ["BLOCK_NBYTES", "aligned_cut", "allreduce_in", "block_numel", "mapped_reduction"]

#: What is reduced at once: one or two such blocks fit in a core's L2 cache, and of shorter ones Python's time counts.
BLOCK_NBYTES = 512 << 10

#: After so many bytes others are let in, such as the exchanges of other process sets.
_TURN_NBYTES = 4 << 20

#: What is reduced in one go where nothing else is in flight; beyond it Python's time does not count.
_PROMPT_NBYTES = 128 << 20

_LINE_NBYTES = 64


def allreduce_in(session: Session, flat: torch.Tensor, blocks: Blocks) -> Steps:
    """As a part of an exchange that goes on, when all members have shown their tensors."""
    rank, peers, numel = session.rank, session.peers, block_numel(BLOCK_NBYTES, flat.element_size())
    lo, hi = aligned_cut(flat.numel(), session.size, flat.element_size())[rank]
    wholes = [
        blocks.flat(flat) if member == rank else blocks.seen(session.content(member, flat.nbytes))
        for member in range(session.size)
    ]
    pieces = zip(*[blocks.split(whole[lo:hi], numel) for whole in wholes], strict=True)
    turn = _TURN_NBYTES // BLOCK_NBYTES
    for number, parts in enumerate(pieces):
        own = parts[rank]
        blocks.reduce(parts, own)
        for peer in peers:
            blocks.copy(own, parts[peer])
        if number % turn == turn - 1:
            yield number
    session.count(REDUCED, 1)
    yield from session.wait(REDUCED, 1)


def mapped_reduction(
    flat: torch.Tensor, op: ReduceOp, scale: float, size: int, rank: int
) -> Callable[[Sequence[np.ndarray[Any, Any]]], None] | None:
    """What this rank does, in one go, to all members' tensors like ``flat``, given as bytes: :func:`allreduce_in`
    between its two waits. None for those so long that others should be let in meanwhile."""
    if flat.nbytes > _PROMPT_NBYTES:
        return None
    step = block_numel(BLOCK_NBYTES, flat.element_size())
    lo, hi = aligned_cut(flat.numel(), size, flat.element_size())[rank]
    kind = _MappedArrays if numpy_can(name_of(flat.dtype), scale) else _MappedTensors
    return kind(flat.dtype, op, scale, size, rank, range(lo, hi, step))


class _MappedArrays:
    """By numpy. ``starts``: where the blocks of this rank's chunk begin, and where the last one ends."""

    __slots__ = ("_blocks", "_dtype", "_peers", "_rank", "_reduce")

    def __init__(self, dtype: torch.dtype, op: ReduceOp, scale: float, size: int, rank: int, starts: range) -> None:
        self._blocks = [slice(at, min(at + starts.step, starts.stop)) for at in starts]
        self._reduce = ArrayReduction(op, name_of(dtype), scale, size, min(starts.step, starts.stop - starts.start))
        self._dtype = self._reduce.dtype
        self._rank, self._peers = rank, [peer for peer in range(size) if peer != rank]

    def __call__(self, contents: Sequence[np.ndarray[Any, Any]]) -> None:
        dtype, rank, peers, reduce = self._dtype, self._rank, self._peers, self._reduce.quietly
        wholes = [content.view(dtype) for content in contents]
        with np.errstate(all="ignore"):
            for block in self._blocks:
                parts = [whole[block] for whole in wholes]
                own = parts[rank]
                reduce(parts, own)
                for peer in peers:
                    np.copyto(parts[peer], own)


class _MappedTensors:
    """By torch, of what numpy has no type for. What it reduces in is made for each call: recipes are kept, and many."""

    __slots__ = ("_dtype", "_make", "_peers", "_rank", "_starts")

    def __init__(self, dtype: torch.dtype, op: ReduceOp, scale: float, size: int, rank: int, starts: range) -> None:
        self._dtype, self._starts = dtype, starts
        self._make = partial(Reduction, op, dtype, scale, size, min(starts.step, starts.stop - starts.start))
        self._rank, self._peers = rank, [peer for peer in range(size) if peer != rank]

    def __call__(self, contents: Sequence[np.ndarray[Any, Any]]) -> None:
        rank, peers, starts = self._rank, self._peers, self._starts
        if not starts:
            return
        reduce = self._make()
        chunks = [torch.from_numpy(content).view(self._dtype)[starts.start : starts.stop] for content in contents]
        for parts in zip(*[torch.unsafe_split(chunk, starts.step) for chunk in chunks], strict=True):
            own = parts[rank]
            reduce(parts, own)
            for peer in peers:
                parts[peer].copy_(own)


def block_numel(nbytes: int, itemsize: int) -> int:
    """The length of a block of so many bytes; 16-bit floats are reduced in float32, so their blocks are counted so."""
    return nbytes // max(4, itemsize)


def aligned_cut(numel: int, pieces: int, itemsize: int) -> list[tuple[int, int]]:
    """``[0, numel)`` in pieces that begin at cache lines, if the whole does; the last ones may be empty."""
    unit = _LINE_NBYTES // itemsize
    return [(min(lo * unit, numel), min(hi * unit, numel)) for lo, hi in cut(0, -(-numel // unit), pieces)]
