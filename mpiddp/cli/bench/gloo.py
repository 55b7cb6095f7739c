"""torch.distributed over gloo, as a peer to compare with. Its ranks find each other by an address that MPI carries."""

from __future__ import annotations

import datetime
import socket
from typing import Any

import torch.distributed as dist

from ... import runtime
from .place import Place

__all__ = ["close_gloo", "open_gloo"]

_TIMEOUT = datetime.timedelta(seconds=60)


def open_gloo(place: Place) -> str | None:
    """Make gloo torch's default process group. Collective; on every rank either None or why some rank could not."""
    store, reason, address = None, None, None
    if not dist.is_available() or not dist.is_gloo_available():
        reason = "this torch has no gloo"
    elif place.rank == 0:
        try:
            is_one_node = len(set(runtime.current().world.nodes)) == 1
            store = _store("127.0.0.1" if is_one_node else socket.gethostname(), 0, place, is_master=True)
            address = store.host, store.port
        except (RuntimeError, OSError) as error:
            reason = f"no store: {error}"
    reason = _first(place.comm.allgather(reason))
    if reason is not None:
        return reason
    host, port = place.comm.bcast(address, 0)
    try:
        store = store or _store(host, port, place, is_master=False)
        dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.size, timeout=_TIMEOUT)
    except (RuntimeError, OSError) as error:
        reason = f"rank {place.rank}: {str(error).splitlines()[0]}"
    reason = _first(place.comm.allgather(reason))
    if reason is not None:
        close_gloo()
    return reason


def close_gloo() -> None:
    """Give the process group back, where there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _store(host: str, port: int, place: Place, is_master: bool) -> Any:
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, place.size, is_master=is_master, timeout=_TIMEOUT, wait_for_workers=False
    )


def _first(reasons: list[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)
