"""The arithmetic of a reduction on a GPU: combine, scale and cast in one pass over the memory, which is what it costs.

Naive equivalent: ``scale_(x_0 op x_1 op ...)``, with 16-bit floats in float32 and rounded once. By kernels that cupy
compiles where cupy is installed; else by torch's operations, which read and write the memory once for each of them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..dtypes import INTEGERS, name_of, scale_
from ..log import logger
from .base import ReduceOp
from .reduction import Reduction

__all__ = ["combine", "has_kernels", "reduce_parts", "source_of"]

#: Threads of a block, and blocks at most: some 16 for each processor of a large GPU. Each thread goes on until all is
#: done.
_THREADS = 256
_BLOCKS = 2048

#: Parts and results that one kernel takes; for more, torch's operations.
_POINTERS = 64

#: The C type of an element, and that in which it is computed.
_TYPES = {
    "float64": ("double", "double"),
    "float32": ("float", "float"),
    "float16": ("Half", "float"),
    "bfloat16": ("Brain", "float"),
    "int64": ("long long", "long long"),
    "int32": ("int", "int"),
    "int16": ("short", "short"),
    "int8": ("signed char", "signed char"),
    "uint8": ("unsigned char", "unsigned char"),
    "bool": ("bool", "bool"),
}

# A NaN of either wins, as torch.minimum and torch.maximum have it.
_COMBINE = {
    ReduceOp.SUM: "a + b",
    ReduceOp.PRODUCT: "a * b",
    ReduceOp.MIN: "a != a ? a : b != b ? b : b < a ? b : a",
    ReduceOp.MAX: "a != a ? a : b != b ? b : b > a ? b : a",
}

#: 16-bit floats without CUDA's headers, which not every installation has. Both round to the nearest, ties to even.
_SIXTEEN_BIT = {
    "float16": r"""
struct Half {
    unsigned short bits;
    __device__ Half() {}
    __device__ explicit Half(float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
    __device__ explicit operator float() const {
        float x;
        asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
        return x;
    }
};
""",
    "bfloat16": r"""
struct Brain {
    unsigned short bits;
    __device__ Brain() {}
    __device__ explicit Brain(float x) {
        const unsigned wide = __float_as_uint(x);
        bits = x != x ? 0x7fc0 : (unsigned short)((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
    }
    __device__ explicit operator float() const { return __uint_as_float((unsigned)bits << 16); }
};
""",
}

_SOURCE = r"""
typedef %(type)s T;
typedef %(wide)s W;
typedef unsigned long long size;
struct __align__(16) Pack { T at[%(pack)d]; };

__device__ __forceinline__ W combined(W a, W b) { return (W)(%(combine)s); }
__device__ __forceinline__ T finished(W x, double factor, long long divisor) { %(finish)s }

extern "C" __global__ void reduce(%(parameters)s, size numel, double factor, long long divisor) {
    const T* const parts[] = {%(parts)s};
    T* const outs[] = {%(outs)s};
    const size stride = (size)gridDim.x * blockDim.x, first = (size)blockIdx.x * blockDim.x + threadIdx.x;
    const size packs = %(packs)s;
    for (size p = first; p < packs; p += stride) {
        W total[%(pack)d];
        Pack part = ((const Pack*)parts[0])[p];
        #pragma unroll
        for (int i = 0; i < %(pack)d; i++) total[i] = (W)part.at[i];
        #pragma unroll
        for (int k = 1; k < %(count)d; k++) {
            part = ((const Pack*)parts[k])[p];
            #pragma unroll
            for (int i = 0; i < %(pack)d; i++) total[i] = combined(total[i], (W)part.at[i]);
        }
        #pragma unroll
        for (int i = 0; i < %(pack)d; i++) part.at[i] = finished(total[i], factor, divisor);
        #pragma unroll
        for (int t = 0; t < %(targets)d; t++) ((Pack*)outs[t])[p] = part;
    }
    for (size e = packs * %(pack)d + first; e < numel; e += stride) {
        W total = (W)parts[0][e];
        #pragma unroll
        for (int k = 1; k < %(count)d; k++) total = combined(total, (W)parts[k][e]);
        const T result = finished(total, factor, divisor);
        #pragma unroll
        for (int t = 0; t < %(targets)d; t++) outs[t][e] = result;
    }
}
"""


def source_of(dtype: str, op: ReduceOp, count: int, targets: int, is_aligned: bool) -> str:
    """The kernel in CUDA C++, for so many parts and results. ``is_aligned``: all lie at multiples of 16 bytes.

    16 bytes are read at once, and all loops over parts unrolled, so that many loads are under way for each thread.
    """
    kind, wide = _TYPES[dtype]
    parts, outs = [f"x{k}" for k in range(count)], [f"y{k}" for k in range(targets)]
    pack = 16 // getattr(torch, dtype).itemsize
    return _SIXTEEN_BIT.get(dtype, "") + _SOURCE % {
        "type": kind,
        "wide": wide,
        "pack": pack,
        "packs": f"numel / {pack}" if is_aligned else "0",
        "combine": _COMBINE[op],
        "finish": _finish(dtype),
        "count": count,
        "targets": targets,
        "parts": ", ".join(parts),
        "outs": ", ".join(outs),
        "parameters": ", ".join([*(f"const T* {x}" for x in parts), *(f"T* {y}" for y in outs)]),
    }


def _finish(dtype: str) -> str:
    """As dtypes.scale_: integers are divided, or multiplied in float64, and truncated towards zero."""
    if dtype == "bool":
        return "return x;"
    if getattr(torch, dtype) in INTEGERS:
        return "return divisor ? (T)(x / (W)divisor) : factor == 1.0 ? (T)x : (T)trunc((double)x * factor);"
    return "return (T)(factor == 1.0 ? x : x * (W)factor);"


@functools.cache
def has_kernels() -> bool:
    """Whether cupy is installed, to compile and launch them."""
    return importlib.util.find_spec("cupy") is not None


def _cupy() -> Any:
    return importlib.import_module("cupy")


@functools.cache
def _kernel(dtype: str, op: ReduceOp, count: int, targets: int, is_aligned: bool) -> Any:
    """Compiled for the current device; None where that fails."""
    try:
        kernel = _cupy().RawKernel(source_of(dtype, op, count, targets, is_aligned), "reduce", ("--std=c++17",))
        kernel.compile()
    except Exception as error:  # of many kinds: an import's, the driver's, the compiler's
        _say_once(f"{type(error).__name__}: {error}")
        return None
    return kernel


@functools.cache
def _say_once(why: str) -> None:
    logger.warning(
        "cupy cannot compile a kernel, so torch's operations take its place, which is slower: %s. Its version must be "
        "that of the driver and of PyTorch's CUDA (cupy-cuda12x or cupy-cuda13x)",
        why,
    )


class _Handle:
    """A stream of the driver's, for cupy."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


@functools.lru_cache(maxsize=256)
def _stream(address: int, device: int) -> Any:
    """cupy's object for it. Torch's streams live as long as the process, in a pool of 32 a device and priority."""
    streams = _cupy().cuda
    if hasattr(streams.Stream, "from_external"):  # from version 14 on, where ExternalStream warns at each use
        return streams.Stream.from_external(_Handle(address))
    return streams.ExternalStream(address, device)


def _launch(op: ReduceOp, parts: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], scale: float) -> bool:
    """False where there is no kernel, and nothing was done."""
    first, device = parts[0], torch.cuda.current_device()  # not a peer's, whose part may come first
    addresses = [tensor.data_ptr() for tensor in (*parts, *outs)]
    is_aligned = not any(address % 16 for address in addresses)
    kernel = _kernel(name_of(first.dtype), op, len(parts), len(outs), is_aligned)
    if kernel is None:
        return False
    numel = first.numel()
    work = -(-first.nbytes // 16) if is_aligned else numel
    arguments = [*(np.uint64(address) for address in addresses), np.uint64(numel), *_factors(first.dtype, scale)]
    stream = _stream(torch.cuda.current_stream(device).cuda_stream, device)
    with _cupy().cuda.Device(device), stream:
        kernel((min(_BLOCKS, -(-work // _THREADS)),), (_THREADS,), arguments)
    return True


def _factors(dtype: torch.dtype, scale: float) -> tuple[np.float64, np.int64]:
    """The factor; and the whole number that integers are divided by, or 0."""
    divisor = round(1 / scale) if scale and dtype in INTEGERS else 0
    return np.float64(scale), np.int64(divisor if divisor and scale == 1 / divisor and scale != 1.0 else 0)


def combine(op: ReduceOp, first: torch.Tensor, second: torch.Tensor, out: torch.Tensor, scale: float = 1.0) -> None:
    """``out = scale * (first op second)`` on the current stream; ``out`` may be either of them."""
    reduce_parts(op, (first, second), (out,), scale)


def reduce_parts(op: ReduceOp, parts: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], scale: float = 1.0) -> None:
    """Each of ``outs`` becomes ``scale * (x_0 op x_1 op ...)`` of ``parts``, combined in their order, on the current
    stream and device. ``outs`` may be among ``parts``; all are contiguous, of one length and dtype. What lies on other
    devices is memory of peers.

    Cost by a kernel: each part is read once, each result written once.
    """
    first = parts[0]
    if not first.numel():
        return
    can_launch = outs[0].is_cuda and len(parts) + len(outs) <= _POINTERS and name_of(first.dtype) in _TYPES
    if can_launch and has_kernels() and _launch(op, parts, outs, scale):
        return
    _by_torch(op, parts, outs, scale)


def _by_torch(op: ReduceOp, parts: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], scale: float) -> None:
    """On the current device, whose current stream has done all when it has done this: torch copies between devices on
    the stream of the source, and has the stream of the target wait."""
    first, out = parts[0], outs[0]
    if out.is_cuda:
        here = torch.device("cuda", torch.cuda.current_device())
        out = next((each for each in outs if each.device == here), out)
    parts = [part if part.device == out.device else part.to(out.device) for part in parts]
    parts = [out if part.data_ptr() == out.data_ptr() else part for part in parts]  # Reduction asks which one it is
    if len(parts) == 1:
        scale_(out.copy_(parts[0]), scale)
    else:
        Reduction(op, first.dtype, scale, len(parts), first.numel(), out.device)(parts, out)
    for each in outs:
        if each is not out:
            each.copy_(out)
