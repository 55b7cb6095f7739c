"""All-reduce of sparse tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import dtypes
from ..errors import ArgumentError
from ..op import Average, Op, Sum
from ..process_set import ProcessSet, global_process_set
from .group import GroupHandle
from .move import gather
from .submit import channel_of, part_names, synchronize

__all__ = ["sparse_allreduce_async"]


def sparse_allreduce_async(
    tensor: torch.Tensor, name: str | None, op: Op = Average, process_set: ProcessSet = global_process_set
) -> Callable[[], torch.Tensor]:
    """Sum or average sparse COO tensors of one shape: indices and values are gathered, equal indices are added.

    Returns a callable that waits and gives the coalesced result. Cost: two all-gathers.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.sparse_coo:
        given = tensor.layout if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ArgumentError(f"sparse_allreduce_async takes a sparse COO tensor, not {given}")
    if op not in (Average, Sum):
        raise ArgumentError(f"sparse tensors are averaged or summed, so op is Average or Sum, not {op!r}")
    if op is Average and tensor.dtype is torch.bool:
        raise TypeError("bool tensors have no average; sum them, which is true where any of them is")
    channel = channel_of(process_set)
    own = tensor.detach().coalesce()
    purpose = f"{op!r} of sparse tensors of shape {tuple(own.shape)}"
    parts = own.indices().t().contiguous(), own.values()
    dtypes.check(own.dtype)
    names = part_names(channel, name, "indices", "values")
    handles = [gather(channel, part, key, purpose=purpose) for key, part in zip(names, parts, strict=True)]
    size = channel.link.size

    def collect() -> torch.Tensor:
        places, values = GroupHandle(handles).collect(synchronize)
        whole = torch.sparse_coo_tensor(places.t(), values, own.shape).coalesce()
        if op is Average:
            dtypes.scale_(whole.values(), 1 / size)
        return whole

    return collect
