"""Sends a device buffer to itself by MPI: a program of its own, started by ``probe.py``, which may crash without harm.

An MPI that knows nothing of GPUs reads the buffer with the processor and is killed for it; that is the answer then.
Needs mpi4py and CUDA's driver, nothing else, so that it takes a second.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
from typing import Any

__all__ = ["main"]

#: Small, middle and large messages go different ways in every MPI.
SIZES = (8, 64 << 10, 4 << 20)


class _Failed(Exception):
    """The text says what did not work; ``proves`` whether MPI is to blame."""

    def __init__(self, text: str, proves: bool) -> None:
        super().__init__(text)
        self.proves = proves


def main(arguments: list[str]) -> None:
    """``arguments``: the GPU's number, and 1 if the libucx wheel is to be loaded. Writes one line of JSON and ends."""
    index, with_libucx = (int(argument) for argument in arguments)
    try:
        driver = _context(index)
        _echo(driver, _start_mpi(bool(with_libucx)))
        answer = {"verdict": "yes", "why": ""}
    except _Failed as failed:
        answer = {"verdict": "no" if failed.proves else "unknown", "why": str(failed)}
    os.write(1, json.dumps(answer).encode() + b"\n")
    os._exit(0)  # finalizing MPI and CUDA could only spoil the answer


def _context(index: int) -> Any:
    try:
        driver: Any = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise _Failed(f"CUDA's driver cannot be loaded: {error}", False) from None
    _call(driver, "cuInit", 0)
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _call(driver, "cuDeviceGet", ctypes.byref(device), index)
    _call(driver, "cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    _call(driver, "cuCtxPushCurrent_v2", context)
    return driver


def _start_mpi(with_libucx: bool) -> Any:
    if with_libucx:
        importlib.import_module("libucx").load_library()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise _Failed(f"MPI does not start in a process of its own: {error}", False) from None
    return MPI


def _echo(driver: Any, mpi: Any) -> None:
    for nbytes in SIZES:
        sent = bytes(i * 7 % 251 for i in range(256)) * (nbytes // 256 + 1)
        source, target = _buffer(driver, nbytes), _buffer(driver, nbytes)
        _call(driver, "cuMemcpyHtoD_v2", source, sent[:nbytes], ctypes.c_size_t(nbytes))
        _call(driver, "cuMemcpyHtoD_v2", target, bytes(nbytes), ctypes.c_size_t(nbytes))
        _call(driver, "cuCtxSynchronize")  # a copy of 64 KiB or less may still be under way
        parts = [[mpi.memory.fromaddress(p.value, nbytes), mpi.BYTE] for p in (target, source)]
        try:
            mpi.Request.Waitall([mpi.COMM_SELF.Irecv(parts[0], 0, 1), mpi.COMM_SELF.Isend(parts[1], 0, 1)])
        except mpi.Exception as error:
            raise _Failed(f"MPI refused {nbytes} bytes of a GPU's memory: {error}", True) from None
        found = ctypes.create_string_buffer(nbytes)
        _call(driver, "cuMemcpyDtoH_v2", found, target, ctypes.c_size_t(nbytes))
        if found.raw != sent[:nbytes]:
            raise _Failed(f"{nbytes} bytes of a GPU's memory came out of MPI changed", True)
        for buffer in (source, target):
            _call(driver, "cuMemFree_v2", buffer)


def _buffer(driver: Any, nbytes: int) -> ctypes.c_uint64:
    pointer = ctypes.c_uint64()
    _call(driver, "cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(nbytes))
    return pointer


def _call(driver: Any, name: str, *arguments: Any) -> None:
    code = getattr(driver, name)(*arguments)
    if code:
        raise _Failed(f"{name} failed with code {code}", False)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose names are not for import
    main(sys.argv[1:])
