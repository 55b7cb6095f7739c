"""Tensors that the other ranks of the node can read and write, so that collectives work on them where they lie: in
memory of the host or of a GPU."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch

from .. import dtypes, runtime
from ..errors import ArgumentError

__all__ = ["empty"]


def empty(
    *size: int | Sequence[int], dtype: torch.dtype | None = None, device: torch.device | str | int | None = None
) -> torch.Tensor:
    """``torch.empty(*size, dtype=dtype, device=device)`` in memory that the ranks of this node share where they can.

    ``device``: the CPU where it is None, whatever torch's default device is. On a GPU it is memory that the node's
    other ranks map (CUDA IPC), apart from torch's caching allocator, in steps of 2 MiB: for few and large tensors.
    Collectives on it, or on contiguous parts of it, are faster from 1 MiB: nothing is copied on the way. The memory is
    given back with the last reference (that of a GPU is kept for the next such tensor); the content stays readable
    after ``shutdown()``. Not collective. Raises NotInitializedError before ``init()``, and ArgumentError for a GPU that
    is not there. In the host's memory a new mapping costs one page fault each 4 KiB at first use.
    """
    lengths: Sequence[int] = size[0] if len(size) == 1 and isinstance(size[0], Sequence) else size  # type: ignore[assignment]
    shape = tuple(operator.index(length) for length in lengths)
    if any(length < 0 for length in shape):
        raise ValueError(f"mpiddp.empty() takes lengths of 0 and more, not {shape}")
    kind = torch.get_default_dtype() if dtype is None else dtype
    dtypes.check(kind)
    where = torch.device("cpu" if device is None else device)
    if where.type == "cpu":
        return runtime.current().memory.segments.empty(shape, kind)
    return _on_gpu(shape, kind, where)


def _on_gpu(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    here = runtime.current()
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if (device.index or 0) >= count:
        why = "; it lies on the CPU or on CUDA devices" if device.type != "cuda" else ""
        raise ArgumentError(
            f"mpiddp.empty() cannot make a tensor on {device} on rank {here.world.rank}, where PyTorch sees {count} "
            f"CUDA device(s){why}; mpiddp.local_device() says which device is this rank's"
        )
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    link = here.channel.link
    within = link if link.levels is None else link.levels.local
    return within.ways.empty(math.prod(shape), dtype, device).view(shape)
