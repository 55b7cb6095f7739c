"""``mpiddp bench --device cuda`` as a user runs it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_reduces(mpirun: Any, tmp_path: Path, ranks: int) -> None:
    arguments = ["--peers", "gloo", "--sizes", "4,300K,1M,16M", "--rounds", "3", "--csv", tmp_path / "a.csv"]
    mpirun(["-m", "mpiddp", "bench", "--device", "cuda", *arguments], ranks, timeout_s=120)
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    by_size = {
        size: {row["contender"]: row for row in rows if row["size_bytes"] == str(size)}
        for size in (4, 300 << 10, 1 << 20, 16 << 20)
    }
    assert set(by_size[4]) == {"mpiddp", "mpiddp shared", "gloo", "x.add_(y)"}
    for size in (300 << 10, 1 << 20, 16 << 20):
        found = by_size[size]
        assert found["mpiddp"]["way"] == found["mpiddp shared"]["way"] == "mapped"
        # Where ranks share a GPU a kernel's time may hold other ranks' turns, of some ms each.
        assert all(float(found[name]["kernel_GBs"]) > 0.01 for name in ("mpiddp", "mpiddp shared", "x.add_(y)"))
        assert float(found["p2p staged"]["time_over_copy"]) > 0 and found["gloo"]["kernel_us"] == ""
