"""What an optimizer that compresses so is made of, and with what it does not go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ...compression import PowerSGD
from ...op import Adasum, Op
from ..layout import Layout
from ..options import Options
from ..wire import Wire
from .layout import PowerLayout
from .wire import PowerWire

__all__ = ["check_powersgd", "ways_of"]


def check_powersgd(compression: Any, op: Op, shard: bool) -> None:
    """Raise ValueError, saying why, for what PowerSGD does not go with; TypeError where it was not made."""
    if compression is PowerSGD:
        raise TypeError("compression=Compression.powersgd lacks its parentheses: Compression.powersgd(rank=4)")
    if not isinstance(compression, PowerSGD):
        return
    if shard:
        raise ValueError(
            "Compression.powersgd() does not go with shard=True: each rank would need all of P and Q to make its part "
            "of a gradient. Leave one of them out, or use Compression.bf16"
        )
    if op is Adasum:
        raise ValueError(
            "Compression.powersgd() does not go with op=Adasum: it replaces the mean of gradients, and Adasum is no "
            "mean. Use op=Average, or another compression"
        )


def ways_of(options: Options) -> tuple[type[Wire], Callable[[Sequence[torch.Tensor]], Layout]]:
    """How a bucket travels, and how buckets are laid out."""
    if isinstance(options.compression, PowerSGD):
        return PowerWire, partial(PowerLayout, compression=options.compression)
    return Wire, Layout
