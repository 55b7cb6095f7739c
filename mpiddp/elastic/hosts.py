"""Notices that hosts have come or are to go, and the agreement of all ranks to act on them at the same moment."""

from __future__ import annotations

import enum
import threading

import torch

from .. import runtime
from ..ops import Max, allreduce_

__all__ = ["HostNotices", "HostUpdate", "HostsUpdatedInterrupt"]


class HostUpdate(enum.IntFlag):
    """What has happened to the list of hosts."""

    no_update = 0
    removed = 1
    added = 2
    mixed = 3


class HostsUpdatedInterrupt(RuntimeError):
    """Raised on all ranks at once by ``commit`` or ``check_host_updates``: the hosts have changed, and nothing failed.

    ``skip_sync``: ranks only went away, so those that are left have nothing to tell each other.
    """

    def __init__(self, skip_sync: bool = False) -> None:
        super().__init__("the list of hosts has changed")
        self.skip_sync = skip_sync


class HostNotices:
    """What this rank has been told since the last :meth:`drop`. Any thread, or a signal handler, may add to it.

    State: ``_told``, guarded by ``_lock``, which may be taken again by the thread that holds it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._told = HostUpdate.no_update
        self._newest = float("-inf")

    def tell(self, timestamp: float, update: HostUpdate) -> None:
        """Note an update; one that is not newer than the last is that one again."""
        with self._lock:
            if timestamp > self._newest:
                self._newest = timestamp
                self._told |= update

    def drop(self) -> None:
        """Forget them: the world has been made anew."""
        with self._lock:
            self._told = HostUpdate.no_update

    def agree(self) -> HostUpdate:
        """What any rank has been told, which is forgotten with that. Collective: an all-reduce of two bytes."""
        with self._lock:
            told, self._told = self._told, HostUpdate.no_update
        flags = torch.tensor([HostUpdate.removed in told, HostUpdate.added in told], device="cpu")
        if runtime.size() > 1:
            allreduce_(flags, op=Max, name="elastic.host_updates")
        removed, added = flags.tolist()
        return HostUpdate(removed * HostUpdate.removed | added * HostUpdate.added)
