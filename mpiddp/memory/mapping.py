"""Files in memory, mapped: what the ranks of a node share is a file that one of them made and the others map.

Mapped by libc's own mmap, not by the module of that name, which keeps a file descriptor open for each mapping: a
large model on many ranks would use up the 1024 that a process usually has.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import weakref
from pathlib import Path
from typing import Any, Protocol

__all__ = ["MemoryFiles", "NamedFiles", "Place", "SharedFiles", "map_file", "open_and_map", "orders_writes"]

_PROT_READ_WRITE = 3
_MAP_SHARED = 1
_MAP_FAILED = ctypes.c_void_p(-1).value

#: Where a tensor lies, as its owner tells the others: the number of the segment among all that the owner ever made, the
#: owner's pid and descriptor, the size of the segment and the tensor's place in it, in bytes.
Place = tuple[int, int, int, int, int]


class SharedFiles(Protocol):
    """A way to make files that other processes of the node can map."""

    def create(self, number: int, nbytes: int) -> int:
        """A file of so many bytes, all zero; its descriptor. OSError where that is not possible."""
        ...

    def path(self, pid: int, fd: int, number: int) -> str:
        """Where another process finds it."""
        ...

    def remove(self, number: int) -> None:
        """Nobody needs to find it any more."""
        ...


class MemoryFiles:
    """Files without a name, found through ``/proc``: nothing is left behind however a process ends, and neither the
    size of /dev/shm counts nor whether the ranks have the same one."""

    def create(self, number: int, nbytes: int) -> int:
        """See :class:`SharedFiles`."""
        fd = os.memfd_create(f"mpiddp-{number}")
        try:
            os.ftruncate(fd, nbytes)
        except OSError:
            os.close(fd)
            raise
        return fd

    def path(self, pid: int, fd: int, number: int) -> str:
        """See :class:`SharedFiles`."""
        return f"/proc/{pid}/fd/{fd}"

    def remove(self, number: int) -> None:
        """See :class:`SharedFiles`."""


class NamedFiles:
    """POSIX shared memory, for where ``/proc`` is closed. ``job`` is the same on all ranks of a node, and no other's.

    The owner holds a lock on each, so that the next job can remove what one that was killed left behind.
    """

    def __init__(self, job: str, directory: Path = Path("/dev/shm")) -> None:
        self._job, self._directory = job, directory
        self._remove_leftovers()

    def create(self, number: int, nbytes: int) -> int:
        """See :class:`SharedFiles`."""
        path = Path(self.path(os.getpid(), -1, number))
        unfinished = path.with_name(f".{path.name}")  # nobody looks for leftovers under such a name
        fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            os.posix_fallocate(fd, 0, nbytes)  # a full file system raises here; writing to the mapping would kill
            unfinished.rename(path)
        except (OSError, AttributeError):  # AttributeError: no posix_fallocate on this system
            os.close(fd)
            unfinished.unlink()
            raise
        return fd

    def path(self, pid: int, fd: int, number: int) -> str:
        """See :class:`SharedFiles`."""
        return str(self._directory / f"mpiddp-{self._job}-{pid}-{number}")

    def remove(self, number: int) -> None:
        """See :class:`SharedFiles`."""
        Path(self.path(os.getpid(), -1, number)).unlink(missing_ok=True)

    def _remove_leftovers(self) -> None:
        for path in self._directory.glob("mpiddp-*-*-*"):
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                continue  # another user's, or gone already
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue  # its owner lives
            else:
                path.unlink(missing_ok=True)
            finally:
                os.close(fd)


def orders_writes(machine: str = "") -> bool:
    """Whether this processor lets others see writes in the order in which they were made."""
    return (machine or platform.machine()).lower() in ("x86_64", "amd64")


def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    numbers = [ctypes.c_int] * 3
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *numbers, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


_LIBC = _libc()


def map_file(fd: int, nbytes: int) -> Any:
    """The file's bytes as a ctypes array; unmapped when nothing refers to the array, or to a view of it, any more."""
    address = _LIBC.mmap(None, nbytes, _PROT_READ_WRITE, _MAP_SHARED, fd, 0)
    if address == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot map {nbytes} bytes of shared memory: {os.strerror(number)}")
    array = (ctypes.c_char * nbytes).from_address(address)
    # Not at exit: tensors over it may be read to the very end of the process.
    weakref.finalize(array, _LIBC.munmap, address, nbytes).atexit = False
    return array


def open_and_map(path: str, nbytes: int) -> Any:
    """Map another process's file; OSError where it cannot be found, or is another one."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        found = os.fstat(fd).st_size
        if found != nbytes:
            raise OSError(f"{path} holds {found} bytes, not {nbytes}: it is not the memory that a peer told of")
        return map_file(fd, nbytes)
    finally:
        os.close(fd)
