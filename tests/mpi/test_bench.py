"""``mpiddp bench`` as a user runs it, with little to measure."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest

BENCH = ["-m", "mpiddp", "bench"]
SHORT = ["--rounds", "2", "--seconds", "1"]


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("n", [1, 2])
def test_all_reduces(mpirun: Any, tmp_path: Path, n: int) -> None:
    done = mpirun([*BENCH, "--sizes", "4,4K,1M", *SHORT, "--csv", tmp_path / "a.csv"], n)
    rows = read(tmp_path / "a.csv")
    names = ["mpiddp", "mpiddp shared", "gloo", "MPI_Allreduce", "x.add_(y)"]
    assert [(int(row["size_bytes"]), row["contender"]) for row in rows] == [
        (nbytes, name) for nbytes in (4, 4096, 1 << 20) for name in names
    ]
    assert all(float(row["time_us"]) > 0 and row["ranks"] == str(n) for row in rows)
    assert rows[0]["time_over_mpiddp"] == "1.0"
    assert done.stdout.count(f"# {n} rank(s) on 1 node(s)") == 1, "one rank writes"
    assert len(re.findall(r"^ +1 MiB +262144 +float32 +sum", done.stdout, re.MULTILINE)) == 4


def test_a_dtype_that_mpi_cannot_add_and_no_peers(mpirun: Any, tmp_path: Path) -> None:
    mpirun([*BENCH, "--sizes", "6", "--dtype", "bfloat16", *SHORT, "--csv", tmp_path / "a.csv"], 2)
    assert [row["contender"] for row in read(tmp_path / "a.csv")] == ["mpiddp", "mpiddp shared", "gloo", "x.add_(y)"]


def test_training_steps(mpirun: Any, tmp_path: Path) -> None:
    arguments = ["--train", "--width", "32", "--batch-size", "2", "--optimizers", "adamw"]
    mpirun([*BENCH, *arguments, *SHORT, "--csv", tmp_path / "a.csv"], 2)
    rows = read(tmp_path / "a.csv")
    assert {row["model"] for row in rows} == {"mlp", "gpt", "small"} and {row["optimizer"] for row in rows} == {"adamw"}
    ways = [row["way"] for row in rows if row["model"] == "small"]
    assert {"local", "local, fused", "local, beside", "mpiddp", "DDP over gloo"} <= set(ways)
    assert all(float(row["step_ms"]) > 0 for row in rows)
    assert {row["parameters"] for row in rows if row["model"] == "small"} == {"17226"}


@pytest.mark.parametrize("way", ["mpiddp", pytest.param("local", marks=pytest.mark.slow)])
def test_memory(mpirun: Any, tmp_path: Path, way: str) -> None:
    mpirun([*BENCH, "--memory", way, "--width", "256", "--rounds", "5", "--csv", tmp_path / "a.csv"], 2)
    (row,) = read(tmp_path / "a.csv")
    assert row["way"] == way and float(row["local_MiB"]) > 10
    assert float(row["largest_gradient_MiB"]) == 0.25
    assert abs(float(row["above_MiB"])) < 40


def test_a_wrong_argument_is_said_once(mpirun: Any) -> None:
    done = mpirun([*BENCH, "--peers", "nccl"], 2, expect="failure")
    assert done.output.count("nccl: no such peer; there are gloo, mpi") == 1


@pytest.mark.slow
def test_without_matplotlib_all_ranks_end_and_one_says_why(mpirun: Any, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'matplotlib' else find(name, *a)\n"
    )
    env = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    done = mpirun([*BENCH, "--sizes", "4", *SHORT, "--plot", tmp_path / "a.png"], 2, env=env, expect="failure")
    assert done.output.count("pip install 'mpiddp[plot]'") == 1


def test_all_reduces_on_gpus_without_one(mpirun: Any) -> None:
    """The CPU stands in for the device: everybody is checked and timed, and the table is complete."""
    script = """
        import contextlib, time
        import torch
        import mpiddp
        from mpiddp.cli.bench import accelerator, gpu, place, reduce
        from mpiddp.cli.bench.timing import Limits

        class Mark(float):
            def elapsed_time(self, other):
                return (other - self) * 1e3

        class Host(accelerator.Accelerator):
            device = torch.device("cpu")
            def __init__(self): self.waited = 0
            def wait(self): self.waited += 1
            def timed(self, call, marks):
                began = Mark(time.perf_counter())
                call()
                marks.append((began, Mark(time.perf_counter())))
            def watch(self, marks): pass
            def beside(self): return contextlib.nullcontext()
            def pinned(self, numel, dtype): return torch.zeros(numel, dtype=dtype)

        here = place.arrive()
        lane = mpiddp.runtime.current().channel.lane()
        if mpiddp.runtime.current().gpu.index is None:
            assert "GPU on every rank; there is none on rank 0 and 1 more: " in accelerator.problem(here)
        peers = reduce.available(["gloo"], here)
        host, limits = Host(), Limits(2, 1.0)
        small = gpu.measure(host, 100, torch.float32, peers, here, limits, None, lane)
        assert [row["contender"] for row in small] == ["mpiddp", "mpiddp shared", "gloo", "x.add_(y)"]
        assert [row["way"] for row in small] == ["whole", "whole", None, None]
        large = gpu.measure(host, 300_000, torch.float32, peers, here, limits, None, lane)
        copies = ["copy to host", "copy both ways", "copy in host", "p2p staged"]
        assert [row["contender"] for row in large][4:] == copies and large[0]["way"] == "staged"
        assert large[3]["kernel_GBs"] > 0 and large[0]["kernel_us"] is None and large[7]["time_over_copy"] > 0
        assert host.waited > 100 and all(set(row) == {c.name for c in gpu.COLUMNS} for row in small + large)
        mpiddp.barrier()
    """
    mpirun(script, 2)
