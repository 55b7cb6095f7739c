"""The GPUs that this rank sees, found without touching any: the question is put to the driver by a child process.

It is asked before MPI starts and answered after, so that it costs ``init()`` next to nothing; and not asked at all
where PyTorch has no CUDA or the machine no device files.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Gpu", "Inquiry", "Seen", "ask"]

#: The first GPU after a start of the machine, without the driver's persistence mode, takes some seconds each.
TIMEOUT_S = 60.0

#: NVIDIA's own, the Windows subsystem's, Jetson's.
_DEVICE_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-gpu", "/dev/nvgpu")

_DRIVER = Path(__file__).with_name("driver.py")


@dataclass(frozen=True)
class Gpu:
    """One GPU; ``peers`` are the numbers of those whose memory it can reach, among the ones that this process sees."""

    uuid: str
    name: str = ""
    nbytes: int = 0
    pci: str = ""
    peers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Seen:
    """The GPUs in CUDA's order, ``cuda:0`` first; ``why`` says why there is none."""

    gpus: tuple[Gpu, ...] = ()
    why: str = ""


class Inquiry:
    """A question that has been put; ``answer()`` waits for it."""

    def __init__(self, process: subprocess.Popen[str] | None, why: str = "") -> None:
        self._process, self._why = process, why

    def answer(self, timeout_s: float = TIMEOUT_S) -> Seen:
        """What is visible; a driver that crashes or does not answer in time shows nothing."""
        if self._process is None:
            return Seen(why=self._why)
        try:
            out, _ = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            return Seen(why=f"CUDA's driver did not answer within {timeout_s:g} s")
        return _read(out, self._process.returncode)


def _read(out: str, code: int) -> Seen:
    try:
        found = json.loads(out)
        gpus = tuple(Gpu(**{**gpu, "peers": tuple(gpu["peers"])}) for gpu in found["gpus"])
    except (ValueError, KeyError, TypeError):
        return Seen(why=f"asking CUDA's driver ended with code {code}")
    return Seen(gpus, found["why"])


def ask(command: Sequence[str] | None = None, device_files: Sequence[str] = _DEVICE_FILES) -> Inquiry:
    """Ask the driver, in a child process; return at once."""
    if command is None:
        if torch.version.cuda is None:
            return Inquiry(None, "this PyTorch is built without CUDA")
        if not any(Path(path).exists() for path in device_files):
            return Inquiry(None, "this machine has no NVIDIA GPU, or this container is not given one")
        command = [sys.executable, "-I", "-S", str(_DRIVER)]
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError as error:
        return Inquiry(None, f"CUDA's driver cannot be asked: {error}")
    return Inquiry(process)
