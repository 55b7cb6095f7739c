"""GPU memory that the other ranks of a node map: CUDA IPC.

Only memory of cuMemAlloc can be exported this way: not what a caching allocator with expandable segments or
cudaMallocAsync gives. So buckets and staging buffers are allocated here, apart, and never given back to the driver
before the process ends, since a peer may have them mapped; they are used again instead. A handle is opened once; it
cannot be opened in the process that made it.
"""

from __future__ import annotations

import ctypes
import functools
import secrets
import struct
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from ..errors import MpiddpError

__all__ = ["RECORD_NBYTES", "TOKEN_NBYTES", "DeviceMemory", "Libcuda", "PeerMemory", "of_this_process"]

_HANDLE_NBYTES = 64

#: What a peer must know of a tensor: the offset in its block, and the block's handle.
_RECORD = struct.Struct(f"<q{_HANDLE_NBYTES}s")
RECORD_NBYTES = _RECORD.size

#: Blocks are of whole pages of the GPU.
_PAGE_NBYTES = 2 << 20
_CONTENT_NBYTES = 64
TOKEN_NBYTES = RECORD_NBYTES + _CONTENT_NBYTES

_Handle = ctypes.c_ubyte * _HANDLE_NBYTES


class _HandleByValue(ctypes.Structure):
    _fields_ = [("reserved", _Handle)]


class DeviceMemory(Protocol):
    """What an exchange within a node asks of it."""

    def empty(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A flat tensor, of whatever content, that peers can map."""
        ...

    def record(self, tensor: torch.Tensor) -> bytes | None:
        """Where a contiguous tensor lies, for peers; None if they cannot map it."""
        ...

    def tensor(self, record: bytes, like: torch.Tensor) -> torch.Tensor:
        """A peer's tensor, of the length and dtype of ``like``."""
        ...

    def token(self, device: torch.device) -> bytes:
        """TOKEN_NBYTES by which a peer finds out whether it can map this process's memory. OSError where nothing can
        be exported."""
        ...

    def problem(self, token: bytes, device: torch.device) -> str:
        """Why the memory of the peer that made the token cannot be mapped; empty if it can."""
        ...


class Libcuda:
    """The driver's calls that are needed, by ctypes. ``ordinal`` is the device's number in this process."""

    def __init__(self, name: str = "libcuda.so.1") -> None:
        """OSError where there is no driver."""
        self._library = ctypes.CDLL(name)
        self._contexts: dict[int, ctypes.c_void_p] = {}
        self._call("cuInit", 0)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            raise OSError(f"{name}: {(text.value or b'unknown error').decode()} (CUDA error {code})")

    @contextmanager
    def on(self, ordinal: int) -> Iterator[None]:
        """The device's primary context, which is torch's too, is current in this thread."""
        if ordinal not in self._contexts:
            device, context = ctypes.c_int(), ctypes.c_void_p()
            self._call("cuDeviceGet", ctypes.byref(device), ordinal)
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            self._contexts[ordinal] = context
        self._call("cuCtxPushCurrent_v2", self._contexts[ordinal])
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def allocate(self, nbytes: int) -> int:
        """Memory of the current device; its address."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        return address.value

    def export(self, address: int) -> bytes:
        """A handle for the whole block that begins at ``address``."""
        handle = _HandleByValue()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return bytes(handle.reserved)

    def open(self, handle: bytes) -> int:
        """Map another process's block; its address here."""
        address = ctypes.c_uint64()
        by_value = _HandleByValue(_Handle(*handle))
        lazily_enable_peer_access = 1
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), by_value, lazily_enable_peer_access)
        return address.value

    def device_of(self, address: int) -> int:
        """The number of the device whose memory lies at ``address``."""
        ordinal, which = ctypes.c_int(), 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        self._call("cuPointerGetAttribute", ctypes.byref(ordinal), which, ctypes.c_uint64(address))
        return ordinal.value

    def write(self, address: int, data: bytes) -> None:
        """Copy to the device, and wait for that: the driver's call returns when ``data`` is free again, which of 64 KiB
        or less may be before they have arrived."""
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), data, ctypes.c_size_t(len(data)))
        self._call("cuCtxSynchronize")

    def read(self, address: int, nbytes: int) -> bytes:
        """Copy from the device."""
        data = ctypes.create_string_buffer(nbytes)
        self._call("cuMemcpyDtoH_v2", data, ctypes.c_uint64(address), ctypes.c_size_t(nbytes))
        return data.raw


class _Raw:
    """Device memory as torch and cupy read it."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.address = address
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


class _Block:
    __slots__ = ("address", "handle", "nbytes", "ordinal")

    def __init__(self, address: int, nbytes: int, ordinal: int, handle: bytes) -> None:
        self.address, self.nbytes, self.ordinal, self.handle = address, nbytes, ordinal, handle


class PeerMemory:
    """This process's exported blocks, and its mappings of the peers'. State: belongs to whoever pushes, but for
    ``_freed``."""

    def __init__(self, driver: Libcuda) -> None:
        self.driver = driver
        self._blocks: list[_Block] = []
        self._freed: list[_Block] = []
        self._opened: dict[bytes, int] = {}  # where a peer's block lies here, by its handle
        self._taking = threading.Lock()

    def block(self, nbytes: int, ordinal: int) -> _Block:
        """A block that nobody uses, of at least ``nbytes``."""
        size = -(-max(nbytes, 1) // _PAGE_NBYTES) * _PAGE_NBYTES
        with self._taking:
            for block in self._freed:
                if block.ordinal == ordinal and size <= block.nbytes <= 2 * size:
                    self._freed.remove(block)
                    return block
            with self.driver.on(ordinal):
                address = self.driver.allocate(size)
                block = _Block(address, size, ordinal, self.driver.export(address))
            self._blocks.append(block)
        return block

    def empty(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See :class:`DeviceMemory`."""
        ordinal = torch.cuda.current_device() if device.index is None else device.index
        waits = bool(self._freed)
        block = self.block(numel * dtype.itemsize, ordinal)
        if waits:
            torch.cuda.synchronize(device)  # seldom; whoever had the block may still use it on some stream
        raw = _Raw(block.address, block.nbytes)  # torch keeps it as long as the memory is in use
        weakref.finalize(raw, self._freed.append, block).atexit = False
        flat = self._over(raw, ordinal)
        return flat[: numel * dtype.itemsize].view(dtype)

    def record(self, tensor: torch.Tensor) -> bytes | None:
        """See :class:`DeviceMemory`."""
        address = tensor.data_ptr()
        for block in self._blocks:
            if block.address <= address and address + tensor.nbytes <= block.address + block.nbytes:
                return _RECORD.pack(address - block.address, block.handle)
        return None

    def address(self, record: bytes, ordinal: int) -> int:
        """Where a peer's memory lies in this process. OSError where it cannot be mapped."""
        offset, handle = _RECORD.unpack(record)
        begin = self._opened.get(handle)
        if begin is None:
            with self.driver.on(ordinal):
                begin = self._opened[handle] = self.driver.open(handle)
        return begin + int(offset)

    def tensor(self, record: bytes, like: torch.Tensor) -> torch.Tensor:
        """See :class:`DeviceMemory`."""
        try:
            raw = _Raw(self.address(record, like.device.index), like.nbytes)
        except OSError as error:
            raise MpiddpError(
                f"GPU memory of a rank on this node, which could be mapped before, cannot be mapped: {error}"
            ) from error
        return self._over(raw, like.device.index).view(like.dtype)

    def _over(self, raw: _Raw, ordinal: int) -> torch.Tensor:
        """The bytes in place, as a tensor of the device that the address belongs to; no context is made there.
        ``ordinal``: a device of this process's own, in whose context the driver is asked."""
        with self.driver.on(ordinal):  # a thread that has computed nothing yet has no context
            owner = self.driver.device_of(raw.address)
        # Without the right device torch would hand out a copy.
        tensor = torch.as_tensor(raw, device=torch.device("cuda", owner))
        if tensor.data_ptr() != raw.address:
            raise MpiddpError(f"torch copied GPU memory at {raw.address:#x}, which it was to use in place")
        return tensor

    def token(self, device: torch.device) -> bytes:
        """See :class:`DeviceMemory`. The block is never used for anything else."""
        ordinal = device.index or 0
        content = secrets.token_bytes(_CONTENT_NBYTES)
        block = self.block(_CONTENT_NBYTES, ordinal)
        with self.driver.on(ordinal):
            self.driver.write(block.address, content)
        return _RECORD.pack(0, block.handle) + content

    def problem(self, token: bytes, device: torch.device) -> str:
        """See :class:`DeviceMemory`."""
        ordinal = device.index or 0
        try:
            address = self.address(token[:RECORD_NBYTES], ordinal)
            with self.driver.on(ordinal):
                content = self.driver.read(address, _CONTENT_NBYTES)
        except OSError as error:
            return str(error)
        return "" if content == token[RECORD_NBYTES:] else "what is mapped is not its memory"

    def __repr__(self) -> str:
        nbytes = sum(block.nbytes for block in self._blocks)
        return f"PeerMemory({nbytes / (1 << 20):.0f} MiB exported, {len(self._opened)} blocks of peers mapped)"


@functools.cache
def of_this_process() -> PeerMemory:
    """One for all process sets, which outlives shutdown(), as the peers' mappings of it may. OSError where there is no
    driver."""
    return PeerMemory(Libcuda())
