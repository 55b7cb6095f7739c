"""Two MPI installations in one job are noticed; layouts that belong together are not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpiddp import launch, processes

TOGETHER = [
    ("/usr/lib/x86_64-linux-gnu/libmpi.so.40.30.4", "/usr/bin/orterun"),
    ("/usr/lib/x86_64-linux-gnu/openmpi/lib/libmpi.so.40", "/usr/bin/mpirun.openmpi"),
    ("/usr/lib/aarch64-linux-gnu/libmpich.so.12", "/usr/bin/hydra_pmi_proxy"),
    ("/home/u/venv/lib/libmpi.so.40", "/home/u/venv/bin/prterun"),
    ("/home/u/venv/lib/libmpi.so.12", "/home/u/venv/bin/hydra_pmi_proxy"),
    ("/opt/conda/envs/x/lib/libmpi.so.40.40.7", "/opt/conda/envs/x/bin/prted"),
    ("/opt/openmpi/5.0/lib64/libmpi.so.40", "/opt/openmpi/5.0/bin/prted"),
    ("/usr/lib64/openmpi/lib/libmpi.so.40", "/usr/lib64/openmpi/bin/orterun"),
    ("/opt/intel/oneapi/mpi/2021.11/lib/release/libmpi.so.12", "/opt/intel/oneapi/mpi/2021.11/bin/hydra_bstrap_proxy"),
]
APART = [
    ("/home/u/venv/lib/libmpi.so.40", "/usr/bin/orterun"),
    ("/home/u/venv/lib/libmpi.so.40", "/opt/openmpi/4.1/bin/orted"),
    ("/opt/openmpi/5.0/lib/libmpi.so.40", "/opt/openmpi/4.1/bin/orted"),
    ("/usr/lib/x86_64-linux-gnu/libmpi.so.40", "/opt/conda/bin/prterun"),
]
NOBODY = [
    (None, "/usr/bin/orterun"),
    ("/usr/lib/x86_64-linux-gnu/libmpi.so.40", None),
    ("/home/u/venv/lib/libmpi.so.40", "/usr/sbin/slurmstepd"),
    ("/home/u/venv/lib/libmpi.so.40", "/usr/bin/bash"),
]


@pytest.mark.parametrize(("library", "launcher"), TOGETHER + NOBODY)
def test_silent(library: str | None, launcher: str | None) -> None:
    assert launch.foreign_launcher(library, launcher) is None


@pytest.mark.parametrize(("library", "launcher"), APART)
def test_warns_with_both_paths(library: str, launcher: str) -> None:
    text = launch.foreign_launcher(library, launcher)
    assert text is not None and library in text and launcher in text


def test_finds_the_launcher_behind_a_wrapper(tmp_path: Path) -> None:
    for pid, parent, exe in ((30, 20, "/usr/bin/python3"), (20, 10, "/usr/bin/bash"), (10, 5, "/opt/mpi/bin/prted")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (a (b) c) S {parent} 1 1 0")
        (tmp_path / str(pid) / "exe").symlink_to(exe)
    assert processes.daemon(30, tmp_path) == processes.Daemon(10, "/opt/mpi/bin/prted")
    assert processes.daemon(10, tmp_path) is None, "what /proc does not show is nobody"


def test_no_launcher_above_a_plain_process() -> None:
    code = "from mpiddp import launch, processes; print(processes.libmpi_path(), launch.foreign_launcher_here())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["None", "None"]


def test_finds_the_library_in_the_maps(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r--p 0 08:01 5  /usr/lib/libm.so.6\n7f02-7f03 rw-p 0 00:00 0 \n"
        "7f04-7f05 r-xp 0 08:01 6  /opt/my mpi/lib/libmpi.so.40.40.7 (deleted)\n"
    )
    assert processes.libmpi_path(maps) == "/opt/my mpi/lib/libmpi.so.40.40.7"
    assert processes.libmpi_path(tmp_path / "none") is None


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system binds nothing")
def test_usable_cpus_are_at_least_ones_own() -> None:
    assert processes.usable_cpus() >= os.sched_getaffinity(0)
