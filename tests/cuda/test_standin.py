"""No path touches a device pointer from the host: shown without a GPU, on real ranks, by a stand-in for CUDA's driver
whose device memory kills whoever does."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None, reason="compiling the stand-in for libcuda needs gcc"
)


@pytest.fixture(scope="module")
def standin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the stand-in under the names by which it is looked for."""
    folder = tmp_path_factory.mktemp("standin")
    library = folder / "libcuda.so.1"
    command = ["gcc", "-O1", "-w", "-shared", "-fPIC", "-o", str(library), str(HERE / "standin.c"), "-lpthread"]
    subprocess.run(command, check=True, timeout=60)
    (folder / "libnvidia-ml.so.1").symlink_to(library)
    return folder


def run(mpirun: Any, standin: Path, way: str, **env: str) -> None:
    job = [str(HERE / "untouched.py"), way]
    done = mpirun(job, 2, env={"LD_LIBRARY_PATH": str(standin), "PYTHONPATH": path(), **env})
    assert done.stdout.count(f"untouched {way} rank") == 2, done.output


def path() -> str:
    """What this process imports from, for the ranks."""
    return ":".join(entry for entry in sys.path if entry)


def test_a_touch_is_noticed(standin: Path) -> None:
    """The stand-in is worth something."""
    touch = (
        "import ctypes; from mpiddp.memory.ipc import Libcuda; cuda = Libcuda(); at = cuda.allocate(64)\n"
        "cuda.write(at, b'x' * 64); assert cuda.read(at, 64) == b'x' * 64\n"
        "print('so far', flush=True); ctypes.string_at(at, 1)"
    )
    env = {"LD_LIBRARY_PATH": str(standin), "PYTHONPATH": path()}
    done = subprocess.run([sys.executable, "-c", touch], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "so far\n" and done.returncode < 0, done


@pytest.mark.parametrize("way", ["staged", "ipc"])
def test_no_path_touches_device_memory(mpirun: Any, standin: Path, way: str) -> None:
    run(mpirun, standin, way)


@pytest.mark.skipif(
    importlib.util.find_spec("libucx") is None, reason="needs UCX built for CUDA: pip install libucx-cu13"
)
def test_cuda_aware(mpirun: Any, standin: Path) -> None:
    """Device pointers to the real Open MPI and the real UCX."""
    run(mpirun, standin, "cuda-aware", MPIDDP_CUDA_AWARE="1")
