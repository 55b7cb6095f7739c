"""Sizes as people write them, bandwidths in nccl-tests' terms, and how many calls follow one another."""

from __future__ import annotations

__all__ = [
    "DEFAULT_SIZES",
    "LARGE_FROM_NBYTES",
    "algorithm_bandwidth",
    "bus_bandwidth",
    "calls_in_block",
    "parse_size",
    "size_text",
]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

#: Powers of 4 from 4 B to 256 MiB, and two that gradients often come in. In bytes.
DEFAULT_SIZES = tuple(sorted([*(4**n for n in range(1, 15)), 32 << 20, 100 << 20]))

#: Ranks leave the barrier before a block some microseconds apart: so it has so many calls that they take about a
#: millisecond, fewer as they grow. From LARGE_FROM_NBYTES each call's tensor is swept out of the caches before: a few
#: calls, as many as memory has room for their tensors.
_MOST_CALLS = 200
LARGE_FROM_NBYTES = 1 << 20
_LARGE_CALLS = ((32 << 20, 4), (128 << 20, 2))


def parse_size(text: str) -> int:
    """``4``, ``4K``, ``4KiB`` or ``1.5M`` in bytes: 1 K is 1024. Raises ValueError for anything else, and for 0."""
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = number[-1:] if number[-1:].isalpha() else ""
    try:
        nbytes = float(number.removesuffix(unit)) * _UNITS[unit]
    except (ValueError, KeyError):
        raise ValueError(f"{text!r} is no size; write bytes as 4, 4K, 1.5M or 1G") from None
    if nbytes < 1 or nbytes != int(nbytes):
        raise ValueError(f"{text!r} is {nbytes:g} bytes; a size is a whole number of at least 1")
    return int(nbytes)


def size_text(nbytes: int) -> str:
    """``4194304`` as ``4 MiB``."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.4g} {name}"
    return f"{nbytes} B"


def algorithm_bandwidth(nbytes: int, seconds: float) -> float:
    """GB/s (10^9 bytes): the size of the buffer over the time."""
    return nbytes / seconds / 1e9


def bus_bandwidth(nbytes: int, seconds: float, ranks: int) -> float:
    """GB/s of an all-reduce that no longer depend on the number of ranks: each sends and receives 2(p-1)/p of it."""
    return algorithm_bandwidth(nbytes, seconds) * 2 * (ranks - 1) / ranks


def calls_in_block(nbytes: int) -> int:
    """How many calls of this size follow one another without a barrier."""
    if nbytes < LARGE_FROM_NBYTES:
        return min(_MOST_CALLS, LARGE_FROM_NBYTES // nbytes)
    return next((calls for most_nbytes, calls in _LARGE_CALLS if nbytes <= most_nbytes), 1)
