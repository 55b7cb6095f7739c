"""What a user chooses of PowerSGD: gradients travel as products of two thin matrices. The exchange itself is
:mod:`mpiddp.optimizer.powersgd`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch

__all__ = ["PowerSGD"]


@dataclass(frozen=True)
class PowerSGD:
    """For ``DistributedOptimizer(compression=...)``: each gradient of n x m travels as (n + m) * ``rank`` numbers.

    - ``rank``: of the product that stands for a gradient: 1 to 4 as a rule; more is more exact and more bytes.
    - ``start_step``: so many steps are exchanged as they are before the first one is compressed: early gradients change
      much, and what is lost of them costs most.
    - ``min_compression_rate``: a gradient of which less than this factor would be saved travels as it is, as do all of
      fewer than two dimensions.
    - ``seed``: of the matrices that it begins with, the same on every rank; torch's own generator is not touched.

    Raises ValueError for what cannot be.
    """

    rank: int = 4
    start_step: int = 1000
    min_compression_rate: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("start_step", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"powersgd({name}=...) is a whole number of at least {least}, not {value!r}")
        rate = self.min_compression_rate
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate > 0:
            raise ValueError(f"powersgd(min_compression_rate=...) is a number above 0, not {rate!r}")

    def rank_of(self, rows: int, cols: int) -> int:
        """The rank of what stands for such a matrix; 0 where too little would be saved."""
        rank = min(self.rank, rows, cols)
        return rank if (rows + cols) * rank * self.min_compression_rate < rows * cols else 0

    def compress(self, tensor: torch.Tensor) -> NoReturn:
        """Raises TypeError: a single exchange cannot do it, since what it leaves out is sent by later ones."""
        raise TypeError(
            "Compression.powersgd() is for DistributedOptimizer(compression=...), which remembers what a step left "
            "out; for a single exchange use Compression.fp16, .bf16 or .none"
        )

    def decompress(self, tensor: torch.Tensor, ctx: Any) -> NoReturn:
        """Raises TypeError, as :meth:`compress` does."""
        self.compress(tensor)
