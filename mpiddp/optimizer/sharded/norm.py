"""What must be known of all gradients, from the ranks' parts: their norm, and whether all are finite."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ...collectives import ReduceOp, doubling
from ...engine import Engine, Lane

__all__ = ["clip_factor", "total_norm", "unscale"]

#: Norms are taken of rows of so many elements, and summed up in float64.
_ROW_NUMEL = 1 << 16


def total_norm(engine: Engine, lane: Lane, parts: Sequence[torch.Tensor], norm_type: float) -> torch.Tensor:
    """The ``norm_type``-norm of all ranks' ``parts`` together, in their dtype, the same on every rank.

    One pass over the parts and an all-reduce of 8 bytes. Raises ValueError unless ``norm_type`` is positive.
    """
    if not norm_type > 0:
        raise ValueError(f"norm_type must be positive, or inf, not {norm_type!r}")
    is_max = math.isinf(norm_type)
    rows = [_row_norms(part, norm_type) for part in parts if part.numel()]
    norms = (
        torch.cat([row.double().cpu() for row in rows]) if rows else torch.zeros(1, dtype=torch.float64, device="cpu")
    )
    sent = (norms.amax() if is_max else norms.pow(norm_type).sum()).view(1)
    # A maximum with NaN is not the same in every order; a sum tells the others.
    bad = torch.isnan(sent).double()
    op = ReduceOp.MAX if is_max else ReduceOp.SUM
    sent = torch.where(torch.isnan(sent) & is_max, torch.zeros_like(sent), sent)
    engine.wait(lane.launch("norm", lambda link, tag: doubling.allreduce(link, sent, op, tag)))
    if is_max:
        engine.wait(lane.launch("norm is nan", lambda link, tag: doubling.allreduce(link, bad, op, tag)))
        sent = torch.where(bad > 0, torch.full_like(sent, math.nan), sent)
    else:
        sent = sent.pow(1.0 / norm_type)
    like = parts[0] if parts else torch.zeros((), device="cpu")
    return sent[0].to(like.device, like.abs().dtype if like.is_complex() else like.dtype)


def clip_factor(norm: torch.Tensor, max_norm: float) -> float:
    """What torch's clip_grad_norm_ multiplies by; at most 1."""
    return float(torch.clamp(max_norm / (norm + 1e-6), max=1.0))


def unscale(
    engine: Engine, lane: Lane, parts: Sequence[torch.Tensor], found_inf: torch.Tensor, inv_scale: torch.Tensor
) -> None:
    """Multiply ``parts`` by ``inv_scale``; ``found_inf`` becomes 1 on every rank if any rank's are not finite.

    What a GradScaler does with whole gradients. One pass, and an all-reduce of 4 bytes.
    """
    found = torch.zeros_like(found_inf)
    if parts:
        torch._amp_foreach_non_finite_check_and_unscale_(list(parts), found, inv_scale)
    flag = found.cpu().view(1)
    engine.wait(lane.launch("found_inf", lambda link, tag: doubling.allreduce(link, flag, ReduceOp.MAX, tag)))
    found_inf.copy_(torch.maximum(found_inf, flag[0].to(found_inf.device)))


def _row_norms(flat: torch.Tensor, norm_type: float) -> torch.Tensor:
    rows = flat.numel() // _ROW_NUMEL
    head = flat[: rows * _ROW_NUMEL].view(rows, _ROW_NUMEL)
    norms = [torch.linalg.vector_norm(head, norm_type, dim=1)] if rows else []
    if flat.numel() > rows * _ROW_NUMEL:
        norms.append(torch.linalg.vector_norm(flat[rows * _ROW_NUMEL :], norm_type).view(1))
    return torch.cat(norms)
