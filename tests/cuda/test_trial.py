"""Asking the driver and trying MPI, against a stand-in driver whose memory kills the processor that touches it."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mpiddp import gpus
from mpiddp.gpus.visible import _DRIVER
from mpiddp.transport.probe import _ECHO, try_in_child

GPU = "abababab-abab-abab-abab-abababababab"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a libcuda.so.1."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the stand-in driver")
    folder = tmp_path_factory.mktemp("cuda")
    source = Path(__file__).with_name("one_process.c")
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", folder / "libcuda.so.1", source]
    subprocess.run(command, check=True, timeout=60)
    return folder


def test_asking_names_the_gpus_and_makes_no_context(driver: Path) -> None:
    environ = {**os.environ, "LD_LIBRARY_PATH": str(driver)}
    command = [sys.executable, "-I", "-S", str(_DRIVER)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=True)
    (found,) = json.loads(done.stdout)["gpus"]
    assert (found["uuid"], found["name"], found["nbytes"], found["peers"]) == (GPU, "stand-in", 1 << 30, [])
    assert done.stderr == "", "a context was made"


def test_ranks_learn_of_it(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver))
    monkeypatch.setattr("torch.version.cuda", "13.0")
    seen = gpus.ask(device_files=[str(driver)]).answer()
    assert [gpu.uuid for gpu in seen.gpus] == [GPU] and seen.why == ""


def test_the_stand_in_kills_who_touches_it(driver: Path) -> None:
    source = f"""if True:
        import ctypes
        cuda, at = ctypes.CDLL({str(driver / "libcuda.so.1")!r}), ctypes.c_uint64()
        assert cuda.cuMemAlloc_v2(ctypes.byref(at), ctypes.c_size_t(64)) == 0
        assert cuda.cuMemcpyHtoD_v2(at, b"abc", ctypes.c_size_t(3)) == 0
        back = ctypes.create_string_buffer(3)
        assert cuda.cuMemcpyDtoH_v2(back, at, ctypes.c_size_t(3)) == 0 and back.raw == b"abc"
        ctypes.string_at(at.value, 1)
    """
    assert subprocess.run([sys.executable, "-c", source], timeout=60).returncode == -11


def test_an_mpi_without_cuda_is_found_out_and_nobody_is_hurt(driver: Path, monkeypatch: Any, mpirun: Any) -> None:
    assert mpirun.launcher  # or there is no MPI to try
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver))
    if mpirun.flavour == "open mpi":
        monkeypatch.setenv("OMPI_MCA_pml", "ob1")  # an Open MPI that is built with CUDA would ask a driver for more
    verdict = try_in_child(0)
    assert verdict.word == "no" and "SIGSEGV" in verdict.why, verdict


def test_without_a_driver_nothing_is_said_of_mpi() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        verdict = try_in_child(0, [sys.executable, str(_ECHO), "0", "0"])
        assert verdict.word == "unknown" and "cannot be loaded" in verdict.why
    else:
        pytest.skip("this machine has a driver")
