"""What malloc keeps: told once, unless the user has told glibc."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mpiddp import config
from mpiddp.memory.heap import keep_freed

#: 48 MiB are allocated and freed again and again; prints how many page faults that costs.
_FAULTS = """
import ctypes, resource, sys
from mpiddp.memory.heap import keep_freed
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
told = keep_freed(int(sys.argv[1]))
def turn():
    blocks = [libc.malloc(12 << 20) for _ in range(4)]
    for block in blocks:
        ctypes.memset(block, 1, 12 << 20)
    for block in blocks:
        libc.free(block)
for _ in range(5):
    turn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
turn()
print(told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(nbytes: int) -> int:
    child = [sys.executable, "-c", _FAULTS, str(nbytes)]
    told, faults = subprocess.run(child, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    assert (told == "True") is (nbytes > 0)
    return int(faults)


@pytest.mark.skipif("glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""), reason="not glibc")
def test_no_page_fault_where_enough_is_kept() -> None:
    assert _faults(64 << 20) < 100 < _faults(0)


def test_the_users_own_word_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not keep_freed(0)
    monkeypatch.setattr(config, "environ", lambda: {"MALLOC_TRIM_THRESHOLD_": "1"})
    assert not keep_freed(1 << 20)
