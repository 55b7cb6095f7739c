"""The protocol of a compressor, and the one that does nothing."""

from __future__ import annotations

from typing import Any, Protocol

import torch

__all__ = ["Compressor", "NoneCompressor"]


class Compressor(Protocol):
    """Anything with these two, as static methods of a class or methods of an object."""

    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """What travels in place of ``tensor``, and what is needed to undo it."""
        ...

    def decompress(self, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """The tensor again."""
        ...


class NoneCompressor:
    """Everything travels as it is."""

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """``tensor`` itself."""
        return tensor, None

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """``tensor`` itself."""
        return tensor
