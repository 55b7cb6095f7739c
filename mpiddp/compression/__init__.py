"""What gradients look like while they travel: ``Compression.none``, ``.fp16``, ``.bf16``, or a class of the user's own.

A compressor has ``compress(tensor) -> (tensor, context)`` and ``decompress(tensor, context) -> tensor``.
"""

from __future__ import annotations

from .cast import BF16Compressor, FP16Compressor
from .none import Compressor, NoneCompressor

__all__ = ["BF16Compressor", "Compression", "Compressor", "FP16Compressor", "NoneCompressor"]


class Compression:
    """The compressors that come with the library."""

    none = NoneCompressor
    fp16 = FP16Compressor
    bf16 = BF16Compressor
