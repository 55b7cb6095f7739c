"""What gradients look like while they travel: ``Compression.none``, ``.fp16``, ``.bf16``, ``.powersgd(...)``, or a
class of the user's own.

A compressor has ``compress(tensor) -> (tensor, context)`` and ``decompress(tensor, context) -> tensor``.
"""

from __future__ import annotations

from typing import Any

from .cast import BF16Compressor, FP16Compressor
from .none import Compressor, NoneCompressor
from .power_sgd import PowerSGD

__all__ = ["BF16Compressor", "Compression", "Compressor", "FP16Compressor", "NoneCompressor", "PowerSGD", "is_lossy"]


class Compression:
    """The compressors that come with the library."""

    none = NoneCompressor
    fp16 = FP16Compressor
    bf16 = BF16Compressor
    powersgd = PowerSGD


def is_lossy(compression: Any) -> bool:
    """Whether it is one of ours that rounds. Of the user's own nothing is known."""
    return compression in (FP16Compressor, BF16Compressor) or isinstance(compression, PowerSGD)
