"""The C library's heap, kept as large as the gradients that come and go in it.

Autograd allocates each gradient, its hook moves it into a bucket, and it is freed at once, where a local step keeps it
until ``zero_grad()``. glibc gives the free end of its heap back to the kernel, by default when that is twice the
largest block that it has seen freed, and then takes it again for the next gradients page by page, each filled with
zeros: 3,000 to 10,000 page faults a step for 25 million parameters in layers of 16 MiB, 10 ms of 110. With 64 MiB there
are next to none.
"""

from __future__ import annotations

import ctypes

from .. import config

__all__ = ["keep_freed"]

#: mallopt()'s names, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

#: Blocks from here are mapped one by one, the most that glibc admits on 64 bits; freeing one always gives it back.
_MAPPED_NBYTES = 32 << 20

#: With these the user has told glibc what to do.
_OF_GLIBC = frozenset({"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES"})


def keep_freed(nbytes: int) -> bool:
    """Have malloc keep up to so many bytes that are free at the end of its heap; whether it does.

    It does not where ``nbytes`` is 0, where the environment has told glibc what to do, or with another C library.
    """
    if nbytes <= 0 or not _OF_GLIBC.isdisjoint(config.environ()):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Either call by itself would fix the other threshold at its small initial value.
    return bool(mallopt(_M_MMAP_THRESHOLD, _MAPPED_NBYTES) and mallopt(_M_TRIM_THRESHOLD, nbytes))
