"""Floating-point tensors travel in 16 bits: half the bytes of float32, and sums rounded to 16 bits."""

from __future__ import annotations

from typing import ClassVar

import torch

__all__ = ["BF16Compressor", "FP16Compressor"]


class _Cast:
    dtype: ClassVar[torch.dtype]

    @classmethod
    def compress(cls, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.dtype | None]:
        """``tensor`` in 16 bits, and its dtype; anything but a wider float is left as it is."""
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 2:
            return tensor.to(cls.dtype), tensor.dtype
        return tensor, None

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: torch.dtype | None) -> torch.Tensor:
        """``tensor`` in its own dtype again."""
        return tensor if ctx is None else tensor.to(ctx)


class FP16Compressor(_Cast):
    """float16: 11 bits of precision, but a sum beyond 65504 overflows. ``DistributedOptimizer`` scales what it sends,
    so that no sum does."""

    dtype = torch.float16


class BF16Compressor(_Cast):
    """bfloat16: the range of float32 with 8 bits of precision."""

    dtype = torch.bfloat16
