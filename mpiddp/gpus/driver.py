"""What CUDA's driver says of the GPUs that a process may use: a program of its own, started by ``visible.py``.

Asked in a child process, because ``cuInit`` in the rank itself would fix CUDA_VISIBLE_DEVICES, which scripts set after
``init()``, and break CUDA in children that are forked later. Neither ``cuInit`` nor any question here makes a context:
memory on a GPU is taken only by whoever computes there. Standard library only, so that it starts quickly.
"""

from __future__ import annotations

import ctypes
import json
import sys
import uuid
from typing import Any

__all__ = ["Refused", "describe", "open_driver"]

_NO_DEVICE = 100
_NAMES = {
    3: "CUDA is not initialized",
    34: "the driver is a stub library",
    803: "the kernel's driver and the driver's library have different versions",
    804: "this GPU does not support the compatibility library that is in use",
    999: "unknown error (a module of the driver may be missing after an update: reboot, or nvidia-modprobe)",
}


class Refused(Exception):
    """The driver does not answer; the text says why."""


def open_driver(name: str = "libcuda.so.1") -> Any:
    """The driver's library, initialized. Raises :class:`Refused`."""
    try:
        driver = ctypes.CDLL(name)
    except OSError as error:
        raise Refused(f"the driver's library cannot be loaded: {error}") from None
    checked(driver.cuInit(0), "cuInit")
    return driver


def checked(code: int, call: str) -> None:
    """Raise :class:`Refused` unless ``code`` is CUDA's 0."""
    if code:
        raise Refused(f"{call} failed with code {code}{f': {_NAMES[code]}' if code in _NAMES else ''}")


def describe(driver: Any) -> list[dict[str, Any]]:
    """For each visible GPU in CUDA's order: uuid, name, nbytes, pci, and the numbers of those that it reaches."""
    count = ctypes.c_int()
    checked(driver.cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount")
    devices = [_device(driver, index) for index in range(count.value)]
    return [
        {
            "uuid": _uuid(driver, device),
            "name": _text(driver.cuDeviceGetName, device),
            "nbytes": _nbytes(driver, device),
            "pci": _text(driver.cuDeviceGetPCIBusId, device) if hasattr(driver, "cuDeviceGetPCIBusId") else "",
            "peers": [other for other, peer in enumerate(devices) if other != index and _reaches(driver, device, peer)],
        }
        for index, device in enumerate(devices)
    ]


def _device(driver: Any, index: int) -> ctypes.c_int:
    device = ctypes.c_int()
    checked(driver.cuDeviceGet(ctypes.byref(device), index), "cuDeviceGet")
    return device


def _uuid(driver: Any, device: ctypes.c_int) -> str:
    """As nvidia-smi writes it; that of a part, where the GPU is divided (MIG)."""
    is_newer = hasattr(driver, "cuDeviceGetUuid_v2")
    ask = driver.cuDeviceGetUuid_v2 if is_newer else driver.cuDeviceGetUuid
    found = (ctypes.c_ubyte * 16)()
    checked(ask(ctypes.byref(found), device), "cuDeviceGetUuid")
    return str(uuid.UUID(bytes=bytes(found)))


def _text(ask: Any, device: ctypes.c_int) -> str:
    found = ctypes.create_string_buffer(128)
    return "" if ask(found, len(found), device) else found.value.decode(errors="replace")


def _nbytes(driver: Any, device: ctypes.c_int) -> int:
    ask = driver.cuDeviceTotalMem_v2 if hasattr(driver, "cuDeviceTotalMem_v2") else driver.cuDeviceTotalMem
    found = ctypes.c_size_t()
    return 0 if ask(ctypes.byref(found), device) else found.value


def _reaches(driver: Any, device: ctypes.c_int, peer: ctypes.c_int) -> bool:
    if not hasattr(driver, "cuDeviceCanAccessPeer"):
        return False
    found = ctypes.c_int()
    return driver.cuDeviceCanAccessPeer(ctypes.byref(found), device, peer) == 0 and bool(found.value)


def main() -> None:
    """Write ``{"gpus": [...], "why": "..."}`` in one line; ``why`` says why there is none."""
    found: dict[str, Any] = {"gpus": [], "why": ""}
    try:
        found["gpus"] = describe(open_driver())
    except Refused as refused:
        found["why"] = str(refused)
    if not found["gpus"] and (not found["why"] or f"code {_NO_DEVICE}" in found["why"]):
        found["why"] = "the driver shows no GPU to this process"
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
