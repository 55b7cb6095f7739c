"""Sparse gradients: indices and values are gathered, equal indices are added when the result is coalesced."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..collectives import select
from ..engine import Engine, Lane

__all__ = ["gather_sparse"]


def gather_sparse(
    engine: Engine,
    lane: Lane,
    params: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor | None],
    scale: float,
) -> list[torch.Tensor | None]:
    """For each parameter the sum of all ranks' sparse gradients, times ``scale``; None where no rank has one.

    Blocking, and collective over the lane's members. A rank without a gradient counts as zeros, and a dense gradient as
    its rows that are not zero. What travels lies in host memory, wherever the parameters are.
    """
    size, rank = lane.link.size, lane.link.rank
    own = [None if gradient is None else _rows(gradient) for gradient in gradients]
    counts = torch.full((size, len(own)), -1, dtype=torch.int64, device="cpu")
    for at, gradient in enumerate(own):
        if gradient is not None:
            counts[rank, at] = gradient._nnz()
    _gather(engine, lane, counts, [1] * size)
    results: list[torch.Tensor | None] = []
    for at, (param, gradient) in enumerate(zip(params, own, strict=True)):
        if int(counts[:, at].max()) < 0:
            results.append(None)
            continue
        rows = counts[:, at].clamp(min=0).tolist()
        places = torch.zeros(sum(rows), 1, dtype=torch.int64, device="cpu")
        values = torch.zeros(sum(rows), *param.shape[1:], dtype=param.dtype, device="cpu")
        begin = sum(rows[:rank])
        if gradient is not None:
            places[begin : begin + rows[rank]] = gradient.indices().t()
            values[begin : begin + rows[rank]] = gradient.values()
        _gather(engine, lane, places, rows)
        _gather(engine, lane, values, rows)
        whole = torch.sparse_coo_tensor(places.t(), values.mul_(scale), param.shape, device=param.device)
        results.append(whole.coalesce())
    return results


def _rows(gradient: torch.Tensor) -> torch.Tensor:
    """As sparse rows, each once."""
    if gradient.layout is torch.sparse_coo and gradient.sparse_dim() == 1:
        return gradient.coalesce()
    return gradient.to_dense().to_sparse(1)


def _gather(engine: Engine, lane: Lane, table: torch.Tensor, rows: Sequence[int]) -> None:
    """Each rank has filled its own rows of ``table``; fill in the others'."""
    width = table[:1].numel()
    bounds = [(width * sum(rows[:r]), width * sum(rows[: r + 1])) for r in range(len(rows))]
    flat = table.view(-1)
    engine.wait(lane.launch("sparse", lambda link, tag: select.allgather(link, flat, bounds, tag)))
