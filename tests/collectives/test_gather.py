"""The gather to one rank, in the simulated world."""

from __future__ import annotations

import pytest
import torch

from mpiddp.collectives import chunk_bounds, gather
from tests.simulation import on_all


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("numel", [0, 3, 64, 1001])
def test_every_chunk_reaches_the_root(size: int, numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "_PIECE_NBYTES", 64)
    bounds = chunk_bounds(numel, size)
    for root in range(size):
        flats = [torch.zeros(numel) for _ in range(size)]
        for rank, (lo, hi) in enumerate(bounds):
            flats[rank][lo:hi] = torch.arange(lo, hi)
        network = on_all(
            size, lambda link, f=flats, r=root: gather.gather(link, f[link.rank], bounds, r, tag=3), seed=root
        )
        assert torch.equal(flats[root], torch.arange(numel, dtype=torch.float32))
        assert network.sent_elements[root] == 0 and sum(network.sent_elements) == numel - (
            bounds[root][1] - bounds[root][0]
        )
