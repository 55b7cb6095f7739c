"""A range of a tensor's elements, as they lie in memory, cut into boxes: how torch.distributed.checkpoint names parts.

A rank owns a range of the elements of a parameter, wherever the range begins and ends. Of a matrix that is the end of
one row, some whole rows, and the beginning of another: three boxes. Of n dims it is at most 2n - 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Box", "boxes"]


@dataclass(frozen=True)
class Box:
    """``sizes`` elements from ``offsets`` on, which are those from ``lo`` to ``hi`` in the order of memory."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    lo: int
    hi: int
    order: tuple[int, ...]

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The box as a tensor of ``sizes``, from its elements in the order of memory. A view."""
        inverse = sorted(range(len(self.order)), key=lambda dim: self.order[dim])
        return flat.view([self.sizes[dim] for dim in self.order]).permute(inverse)


def boxes(size: Sequence[int], stride: Sequence[int], lo: int, hi: int) -> list[Box]:
    """The elements ``[lo, hi)`` of a dense tensor, counted in the order of memory, as boxes that do not overlap."""
    order = tuple(sorted(range(len(size)), key=lambda dim: (-stride[dim], dim)))
    found = []
    for offsets, sizes, begin in _cut([size[dim] for dim in order], lo, hi):
        place, extent = [0] * len(size), [0] * len(size)
        for position, dim in enumerate(order):
            place[dim], extent[dim] = offsets[position], sizes[position]
        found.append(Box(tuple(place), tuple(extent), begin, begin + math.prod(sizes), order))
    return found


def _cut(dims: Sequence[int], lo: int, hi: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Offsets, sizes and first element of each box; ``dims`` from the slowest to the fastest."""
    if hi <= lo:
        return
    if not dims:
        yield (), (), lo
        return
    row = math.prod(dims[1:])
    first, last = -(-lo // row), hi // row  # the whole rows
    if lo % row:
        yield from _within(dims, lo // row, lo % row, min(row, hi - (first - 1) * row))
    if first < last:
        yield (first, *[0] * (len(dims) - 1)), (last - first, *dims[1:]), first * row
    if hi % row and last >= first:
        yield from _within(dims, last, 0, hi % row)


def _within(dims: Sequence[int], at: int, lo: int, hi: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    row = math.prod(dims[1:])
    for offsets, sizes, begin in _cut(dims[1:], lo, hi):
        yield (at, *offsets), (1, *sizes), at * row + begin
