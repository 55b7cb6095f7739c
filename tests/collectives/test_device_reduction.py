"""The reduction on a GPU equals the naive one: torch's path on CPU tensors; the kernels compiled for the CPU by g++, a
single thread; and on a GPU where there is one (tests/gpu)."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mpiddp.collectives import ReduceOp, device_reduction
from mpiddp.collectives.device_reduction import _TYPES, _factors, combine, reduce_parts, source_of
from mpiddp.dtypes import SIXTEEN_BIT, dtype_called, name_of, scale_

OPS = [op for op in ReduceOp if op is not ReduceOp.ADASUM]
CASES = [(name, op) for name in _TYPES for op in OPS if name != "bool" or op in (ReduceOp.MIN, ReduceOp.MAX)]

# What a kernel needs of CUDA, on a CPU: one block of one thread.
_ON_CPU = """
#include <cmath>
#include <cstring>
#include <immintrin.h>
using std::trunc;
#define __device__
#define __global__
#define __forceinline__ inline
#define __align__(n) alignas(n)
static struct { unsigned x; } gridDim = {1}, blockDim = {1}, blockIdx = {0}, threadIdx = {0};
static unsigned __float_as_uint(float x) { unsigned u; std::memcpy(&u, &x, 4); return u; }
static float __uint_as_float(unsigned u) { float x; std::memcpy(&x, &u, 4); return x; }
"""
_CONVERSIONS = {
    'asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));': "bits = _cvtss_sh(x, 0);",
    'asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));': "x = _cvtsh_ss(bits);",
}


def values(part: int, numel: int, dtype: torch.dtype, is_hard: bool = False) -> torch.Tensor:
    """Small whole numbers; ``is_hard``: whatever a float may be, rounding, NaN and infinities among it."""
    generator = torch.Generator().manual_seed(part)
    if not is_hard or not dtype.is_floating_point:
        return torch.randint(0, 3, (numel,), generator=generator).to(dtype)
    flat = torch.randn(numel, generator=generator)
    flat[part::11], flat[part + 3 :: 13] = float("nan"), float("inf")
    return flat.to(dtype)


def naive(op: ReduceOp, parts: list[torch.Tensor], scale: float) -> torch.Tensor:
    """One after the other; 16-bit floats in float32, rounded once."""
    dtype = parts[0].dtype
    wide = torch.float32 if dtype in SIXTEEN_BIT else dtype
    total = parts[0].to(wide, copy=True)
    for part in parts[1:]:
        op.combine(total, part.to(wide), out=total)
    return scale_(total, scale).to(dtype)


@pytest.mark.parametrize(("name", "op"), CASES, ids=lambda x: getattr(x, "name", x))
def test_by_torch(name: str, op: ReduceOp) -> None:
    dtype = dtype_called(name)
    for count in (1, 2, 3):
        for scale in (1.0, 0.5) if op is ReduceOp.SUM else (1.0,):
            parts = [values(k, 37, dtype, is_hard=True) for k in range(count)]
            want = naive(op, parts, scale)
            outs = [parts[-1], torch.empty(37, dtype=dtype)]  # in place, as a ring does
            reduce_parts(op, parts, outs, scale)
            for out in outs:
                assert torch.equal(torch.nan_to_num(out), torch.nan_to_num(want))
    first, second = values(0, 9, dtype), values(1, 9, dtype)
    want = naive(op, [first, second], 1.0)
    combine(op, first, second, first)
    assert torch.equal(first, want)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Compiles all kernels that are tested here at once."""
    gcc = shutil.which("g++")
    if gcc is None or "f16c" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs g++ and a processor with F16C")
    text, names = [_ON_CPU], {}
    for number, (name, op, count, targets, is_aligned) in enumerate(_kernels()):
        source = source_of(name, op, count, targets, is_aligned)
        for cuda, cpu in _CONVERSIONS.items():
            source = source.replace(cuda, cpu)
        names[name, op, count, targets, is_aligned] = f"reduce{number}"
        text.append(f"namespace n{number} {{\n{source.replace(' reduce(', f' reduce{number}(')}\n}}")
    path = tmp_path_factory.mktemp("kernels") / "kernels.cpp"
    path.write_text("\n".join(text))
    library = path.with_suffix(".so")
    command = [gcc, "-O0", "-w", "-std=c++17", "-mf16c", "-shared", "-fPIC", "-o", str(library), str(path)]
    subprocess.run(command, check=True, timeout=120)
    loaded = ctypes.CDLL(str(library))
    return lambda *which: loaded[names[which]]


def _kernels() -> list[tuple[str, ReduceOp, int, int, bool]]:
    few = [(name, op, 2, 1, True) for name, op in CASES]
    return [*few, *((name, ReduceOp.SUM, 3, 2, False) for name in _TYPES if name != "bool")]


@pytest.mark.parametrize(("name", "op"), CASES, ids=lambda x: getattr(x, "name", x))
def test_the_kernels(name: str, op: ReduceOp, kernel: Callable[..., Any]) -> None:
    which = [(2, 1, True)] + ([(3, 2, False)] if op is ReduceOp.SUM else [])
    for count, targets, is_aligned in which:
        for scale in (1.0, 0.5, 0.7) if op is ReduceOp.SUM else (1.0,):
            _check_kernel(kernel(name, op, count, targets, is_aligned), name, op, count, targets, is_aligned, scale)


def _nvrtc() -> Any:
    """CUDA's run-time compiler, which needs no GPU, from its wheel; None where that is not installed."""
    found = importlib.util.find_spec("nvidia")
    for folder in (found.submodule_search_locations or ()) if found else ():
        for path in sorted(Path(folder).glob("*/lib/libnvrtc.so.[0-9]*")):
            return ctypes.CDLL(str(path))
    return None


@pytest.mark.skipif(_nvrtc() is None, reason="needs CUDA's compiler: pip install nvidia-cuda-nvrtc")
def test_the_kernels_compile_for_a_gpu() -> None:
    nvrtc, options = _nvrtc(), (ctypes.c_char_p * 2)(b"--std=c++17", b"--gpu-architecture=sm_90")
    for which in (*_kernels(), ("bfloat16", ReduceOp.SUM, 32, 32, True)):
        program, length = ctypes.c_void_p(), ctypes.c_size_t()
        source = source_of(*which).encode()
        assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"reduce.cu", 0, None, None) == 0
        code = nvrtc.nvrtcCompileProgram(program, 2, options)
        assert nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(length)) == 0
        log = ctypes.create_string_buffer(length.value)
        assert nvrtc.nvrtcGetProgramLog(program, log) == 0 and code == 0, (which, log.value.decode())
        assert nvrtc.nvrtcDestroyProgram(ctypes.byref(program)) == 0


def _check_kernel(call: Any, name: str, op: ReduceOp, count: int, targets: int, is_aligned: bool, scale: float) -> None:
    dtype, numel = dtype_called(name), 37
    skipped = 0 if is_aligned else 1  # of a buffer that begins where vectors may be loaded
    parts = [values(k, numel + skipped, dtype, is_hard=True)[skipped:] for k in range(count)]
    want = naive(op, parts, scale)
    outs = [torch.empty(numel + skipped, dtype=dtype)[skipped:] for _ in range(targets)]
    factor, divisor = _factors(dtype, scale)
    call(
        *(ctypes.c_uint64(tensor.data_ptr()) for tensor in (*parts, *outs)),
        ctypes.c_uint64(numel),
        ctypes.c_double(factor),
        ctypes.c_longlong(int(divisor)),
    )
    for out in outs:
        assert torch.equal(torch.isnan(out), torch.isnan(want)), (name_of(dtype), op)
        assert torch.equal(torch.nan_to_num(out), torch.nan_to_num(want)), (name_of(dtype), op, scale)


class FakeCupy:
    """What is used of cupy 14: remembers with which stream and device a kernel was launched."""

    def __init__(self, failing: str = "") -> None:
        self.launched: list[Any] = []
        self.failing = failing
        self.current: list[Any] = []
        self.cuda = self.Stream = self
        self.made = 0

    def RawKernel(self, source: str, name: str, options: tuple[str, ...]) -> FakeCupy:  # noqa: N802
        return self

    def compile(self) -> None:
        if self.failing:
            raise RuntimeError(self.failing)

    def from_external(self, stream: Any) -> FakeCupy:
        self.made += 1
        assert stream.__cuda_stream__() == (0, 77)
        return self

    def Device(self, number: int) -> FakeCupy:  # noqa: N802
        assert number == 3
        return self

    def __enter__(self) -> None:
        self.current.append(self)

    def __exit__(self, *_: object) -> None:
        self.current.pop()

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], arguments: list[Any]) -> None:
        assert len(self.current) == 2
        self.launched.append((grid, block, [int(each) for each in arguments]))


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCupy]:
    fake = FakeCupy()
    monkeypatch.setattr(device_reduction, "_cupy", lambda: fake)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    monkeypatch.setattr("torch.cuda.current_stream", lambda _: type("Stream", (), {"cuda_stream": 77}))
    for cached in (device_reduction._kernel, device_reduction._stream, device_reduction._say_once):
        cached.cache_clear()
    yield fake
    for cached in (device_reduction._kernel, device_reduction._stream, device_reduction._say_once):
        cached.cache_clear()


def test_a_launch(cupy: FakeCupy) -> None:
    """On the current device and stream, which are asked for once a stream."""
    parts = [torch.ones(1000), torch.ones(1000)]
    for _ in range(2):
        assert device_reduction._launch(ReduceOp.SUM, parts, parts[:1], 1.0)
    grid, block, arguments = cupy.launched[1]
    assert (grid, block) == ((1,), (256,)) and cupy.made == 1
    assert arguments == [parts[0].data_ptr(), parts[1].data_ptr(), parts[0].data_ptr(), 1000, 1, 0]


def test_a_kernel_that_does_not_compile(cupy: FakeCupy, caplog: pytest.LogCaptureFixture) -> None:
    """It is said once, and torch's operations take its place."""
    cupy.failing = "libnvrtc.so.13 is missing"
    with caplog.at_level(logging.WARNING, "mpiddp"):
        for op in (ReduceOp.SUM, ReduceOp.MAX):
            assert not device_reduction._launch(op, [torch.ones(3)], [torch.ones(3)], 1.0)
    assert len(caplog.records) == 1 and "libnvrtc.so.13 is missing" in caplog.text and not cupy.launched
