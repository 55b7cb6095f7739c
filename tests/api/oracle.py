"""What the collectives should give, in plain torch and NumPy, from the tensors of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch

__all__ = ["DTYPES", "FORMS", "adasum", "close", "everyones", "reduced", "scaled"]

DTYPES = [
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
]  # fmt: skip

#: Every way to call an all-reduce, as a function that returns the result for one tensor.
FORMS: dict[str, Callable[..., torch.Tensor]] = {
    "allreduce": lambda w, t, **k: w.allreduce(t, **k),
    "allreduce_": lambda w, t, **k: w.allreduce_(t, **k),
    "allreduce_async": lambda w, t, **k: w.synchronize(w.allreduce_async(t, **k)),
    "allreduce_async_": lambda w, t, **k: w.synchronize(w.allreduce_async_(t, **k)),
    "grouped_allreduce": lambda w, t, **k: w.grouped_allreduce([t, t], **k)[1],
    "grouped_allreduce_": lambda w, t, **k: w.grouped_allreduce_([t], **k)[0],
    "grouped_allreduce_async": lambda w, t, **k: w.synchronize(w.grouped_allreduce_async([t, t], **k))[0],
    "grouped_allreduce_async_": lambda w, t, **k: w.synchronize(w.grouped_allreduce_async_([t], **k))[0],
}


def everyones(size: int, shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """Each rank's tensor: small whole numbers, so that sums and products of a few of them are exact in every dtype."""
    found = []
    for rank in range(size):
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        found.append(torch.randint(0, 4, tuple(shape), generator=generator).to(dtype))
    return found


def scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """Integers in float64 and truncated, 16-bit floats in float32."""
    if factor == 1.0:
        return tensor
    if not tensor.is_floating_point():
        return (tensor.to(torch.float64) * factor).trunc().to(tensor.dtype)
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return (tensor.to(wide) * factor).to(tensor.dtype)


def reduced(
    world: Any, tensors: Sequence[torch.Tensor], op: Any, prescale: float = 1.0, postscale: float = 1.0
) -> torch.Tensor:
    """What an all-reduce of these tensors should give."""
    dtype, size = tensors[0].dtype, len(tensors)
    wide = torch.float64 if dtype.is_floating_point else torch.int64
    stack = torch.stack([scaled(tensor, prescale).to(wide) for tensor in tensors])
    if op in (world.Sum, world.Average):
        total = stack.sum(0)
        if op is world.Average:
            divided = total.to(torch.float64) * postscale / size
            return (divided if dtype.is_floating_point else divided.trunc()).to(dtype)
    elif op is world.Product:
        total = stack.prod(0)
    else:
        total = stack.amin(0) if op is world.Min else stack.amax(0)
    return scaled(total.to(dtype), postscale)


def close(result: torch.Tensor, want: torch.Tensor) -> None:
    """Equal in shape and dtype, and in value up to one rounding of the dtype."""
    tolerance = torch.finfo(want.dtype).eps if want.is_floating_point() else 0.0
    torch.testing.assert_close(result, want, rtol=2 * tolerance, atol=0.0)


def adasum(vectors: Sequence[numpy.ndarray[Any, Any]]) -> numpy.ndarray[Any, Any]:
    """The adaptive sum of arXiv 2006.02924, by halves: neighbours first."""
    if len(vectors) == 1:
        return vectors[0].astype(numpy.float64)
    half = len(vectors) // 2
    a, b = adasum(vectors[:half]), adasum(vectors[half:])
    dot, aa, bb = float((a * b).sum()), float((a * a).sum()), float((b * b).sum())
    return (1 - dot / (2 * aa) if aa else 1.0) * a + (1 - dot / (2 * bb) if bb else 1.0) * b
