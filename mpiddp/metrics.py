"""mean: a metric over all ranks, as the sum of sums over the sum of counts."""

from __future__ import annotations

import torch

from . import runtime
from .ops import Sum, allreduce

__all__ = ["mean"]


def mean(total: torch.Tensor | float, count: torch.Tensor | float, name: str | None = None) -> float:
    """The mean over all ranks of something that each rank has summed up: ``sum of totals / sum of counts``.

    Never a mean of means: ranks may have counted differently much, or nothing (``mean(0, 0)`` on a rank without
    samples is right). Every rank must call it, and every rank gets the same number. It is computed in float64: whole
    numbers are exact up to 2**53. One all-reduce of 16 bytes.

    Args:
        total: this rank's sum: a number, or a tensor of one element on any device.
        count: how many samples went into it: likewise.
        name: of the all-reduce, as in :func:`mpiddp.allreduce`.

    Raises:
        TypeError, ValueError: ``total`` or ``count`` is not one number.
        ValueError: on every rank: the counts of all ranks add up to nothing.
    """
    sums = torch.tensor([_number("total", total), _number("count", count)], dtype=torch.float64, device="cpu")
    whole_total, whole_count = allreduce(sums, op=Sum, name=name).tolist()
    # Checked after the exchange, so that all ranks raise alike and none is left waiting.
    if not whole_count > 0:
        raise ValueError(f"mean of nothing: the counts of all {runtime.size()} ranks add up to {whole_count:g}")
    return float(whole_total / whole_count)


def _number(what: str, value: torch.Tensor | float) -> float:
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        raise ValueError(f"{what} must be one number, not a tensor of shape {tuple(value.shape)}: sum it first")
    return float(value)
