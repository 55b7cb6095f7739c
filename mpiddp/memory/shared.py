"""A little memory that the ranks of a node share. Which way it is had is agreed by all of them."""

from __future__ import annotations

import mmap
import os
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..log import logger

__all__ = ["HEADER_NBYTES", "share"]

#: The memory begins with a token, by which each rank knows that it maps what the others map.
HEADER_NBYTES = 64
_TOKEN_NBYTES = 16


def share(comm: Any, nbytes: int) -> mmap.mmap | None:
    """``nbytes`` that all ranks of ``comm``, a communicator within a node, map: zeros after the header. Collective.

    None, on all of them, where nothing can be shared: containers of their own under one host name, say.
    """
    if comm.size == 1:
        return mmap.mmap(-1, nbytes)
    for offer in (_memory_file, _temporary_file):
        memory = _offered(comm, nbytes, offer)
        if memory is not None:
            return memory
    if comm.rank == 0:
        logger.debug("the ranks of this node share no memory: a stall report cannot tell what they are doing")
    return None


def _offered(comm: Any, nbytes: int, offer: Callable[[int], tuple[int, str, bool]]) -> mmap.mmap | None:
    """The memory that rank 0 offers, if every rank can map it."""
    fd, path, is_named, ticket = -1, "", False, None
    if comm.rank == 0:
        try:
            fd, path, is_named = offer(nbytes)
            token = secrets.token_bytes(_TOKEN_NBYTES)
            os.pwrite(fd, token, 0)
            ticket = path, token
        except (OSError, AttributeError) as error:  # AttributeError: no memfd_create on this system
            logger.debug("no shared memory by %s: %s", offer.__name__.strip("_"), error)
    ticket = comm.bcast(ticket, 0)
    memory = _map(ticket[0], ticket[1], nbytes) if ticket else None
    everybody_has_it = all(comm.allgather(memory is not None))
    if is_named:
        Path(path).unlink()
    if fd >= 0:
        os.close(fd)
    return memory if everybody_has_it else None


def _memory_file(nbytes: int) -> tuple[int, str, bool]:
    fd = os.memfd_create("mpiddp")
    os.ftruncate(fd, nbytes)
    return fd, f"/proc/{os.getpid()}/fd/{fd}", False


def _temporary_file(nbytes: int) -> tuple[int, str, bool]:
    where = "/dev/shm" if Path("/dev/shm").is_dir() else None
    fd, path = tempfile.mkstemp(prefix="mpiddp-", dir=where)
    os.posix_fallocate(fd, 0, nbytes)  # a full file system raises here; writing to the mapping later would kill
    return fd, path, True


def _map(path: str, token: bytes, nbytes: int) -> mmap.mmap | None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        memory = mmap.mmap(fd, nbytes)
    except (OSError, ValueError):  # ValueError: another file, and shorter
        return None
    finally:
        os.close(fd)
    return memory if memory[:_TOKEN_NBYTES] == token else None
