"""Host memory for what passes between a device and the network, kept for the next time: pinning costs a millisecond a
MiB, a copy a twentieth of that."""

from __future__ import annotations

from collections import defaultdict

import torch

from .streams import Driver, Event

__all__ = ["Pinned"]

#: The smallest buffer, and how many idle bytes are kept for the next exchange.
_LEAST_NBYTES = 4 << 10
_KEPT_NBYTES = 512 << 20


class Pinned:
    """Buffers of pinned memory by size, each a power of two. State: belongs to whoever pushes."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._free: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self._busy: list[tuple[torch.Tensor, Event]] = []  # the device still reads or writes them
        self.kept_nbytes = 0

    def take(self, nbytes: int) -> torch.Tensor:
        """A buffer of at least ``nbytes`` that no device touches."""
        size = max(_LEAST_NBYTES, 1 << (nbytes - 1).bit_length()) if nbytes else _LEAST_NBYTES
        self._settle()
        free = self._free[size]
        if not free:
            return self._driver.pinned(size)
        self.kept_nbytes -= size
        return free.pop()

    def give_back(self, buffer: torch.Tensor, after: Event | None = None) -> None:
        """The buffer is free, once the work up to the event ``after`` is done."""
        if after is not None:
            self._busy.append((buffer, after))
        elif self.kept_nbytes + buffer.nbytes <= _KEPT_NBYTES:
            self.kept_nbytes += buffer.nbytes
            self._free[buffer.nbytes].append(buffer)

    def _settle(self) -> None:
        busy, self._busy = self._busy, []
        for buffer, event in busy:
            self.give_back(buffer, None if event.query() else event)

    def __repr__(self) -> str:
        return f"Pinned({self.kept_nbytes / (1 << 20):.1f} MiB kept, {len(self._busy)} buffers in use by the device)"
