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
    return _cupy().RawKernel(source_of(dtype, op, count, targets, is_aligned), "reduce", ("--std=c++17",))


def _launch(op: ReduceOp, parts: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], scale: float) -> None:
    cupy = _cupy()
    first, device = parts[0], torch.cuda.current_device()  # not a peer's, whose part may come first
    addresses = [tensor.data_ptr() for tensor in (*parts, *outs)]
    is_aligned = not any(address % 16 for address in addresses)
    kernel = _kernel(name_of(first.dtype), op, len(parts), len(outs), is_aligned)
    numel = first.numel()
    work = -(-first.nbytes // 16) if is_aligned else numel
    arguments = [*(np.uint64(address) for address in addresses), np.uint64(numel), *_factors(first.dtype, scale)]
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, device)
    with cupy.cuda.Device(device), stream:
        kernel((min(_BLOCKS, -(-work // _THREADS)),), (_THREADS,), arguments)


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
    if outs[0].is_cuda and len(parts) + len(outs) <= _POINTERS and name_of(first.dtype) in _TYPES and has_kernels():
        _launch(op, parts, outs, scale)
        return
    out = outs[0]
    parts = [part if part.device == out.device else part.to(out.device) for part in parts]
    parts = [out if part.data_ptr() == out.data_ptr() else part for part in parts]  # Reduction asks which one it is
    if len(parts) == 1:
        scale_(outs[0].copy_(first), scale)
    else:
        Reduction(op, first.dtype, scale, len(parts), first.numel(), first.device)(parts, outs[0])
    for out in outs[1:]:
        out.copy_(outs[0])
