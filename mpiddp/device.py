"""``local_device()``: where this rank computes."""

from __future__ import annotations

import torch

from . import runtime

__all__ = ["local_device"]


def local_device() -> torch.device:
    """The GPU that is this rank's own, or the CPU where it has none. Raises before ``init()``.

    ``cuda:0`` where the launcher shows each rank a GPU of its own, ``cuda:<local rank>`` where all see all; with fewer
    GPUs than ranks some share one. Told by UUID, so it is right whatever CUDA_VISIBLE_DEVICES says on which rank.

    Use it before anything else touches CUDA (``torch.cuda.set_device(mpiddp.local_device())``): a tensor that is made
    on plain ``"cuda"`` goes to ``cuda:0`` and leaves a context of some hundred MiB there, on every rank.
    """
    index = runtime.current().gpu.index
    return torch.device("cpu") if index is None else torch.device("cuda", index)
