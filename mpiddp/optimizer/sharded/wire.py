"""How a bucket's sum reaches the owners of its shards, and how shards reach everybody."""

from __future__ import annotations

import torch

from ...collectives import ReduceOp, select
from ...collectives.base import chunk_bounds
from ...engine import Handle
from ...engine.device import launch
from ...transport.base import Link, Steps
from ..layout import Bucket
from ..wire import Sending, Wire

__all__ = ["ShardWire"]


class ShardWire(Wire):
    """Shard r of a bucket is the r-th of as many equal parts of its data as there are members."""

    def own(self, data: torch.Tensor) -> torch.Tensor:
        """This member's shard of a bucket's data, a view."""
        lo, hi = chunk_bounds(data.numel(), self._lane.link.size)[self._lane.link.rank]
        return data[lo:hi]

    def launch(self, name: str, bucket: Bucket, factor: float = 1.0) -> Sending:
        """Reduce ``factor`` times the bucket: each member gets its own shard of the sum, and all get the flags.

        A compressor of the user's own gets each gradient by itself, and so whole: right, but no bytes are saved.
        """
        if self._prescale * factor != 1.0:
            bucket.data.mul_(self._prescale * factor)
        if self.is_own:
            return self._launch_own(name, bucket)
        packed, _ = self._compression.compress(bucket.data)
        handles = [self._reduce_scatter(name, packed), self._reduce(f"{name}, flags", bucket.tail)]

        def arrived() -> None:
            if packed is not bucket.data or self._gain != 1.0:
                self._unpack(self.own(packed), self.own(bucket.data))

        return Sending(handles, arrived)

    def gather(self, name: str, bucket: Bucket) -> Handle:
        """Every member's shard reaches all members, in place."""
        data, segment = bucket.data, self._segment_nbytes
        bounds = chunk_bounds(data.numel(), self._lane.link.size)

        def start(link: Link, flat: torch.Tensor, tag: int) -> Steps:
            return select.allgather(link, flat, bounds, tag, segment)

        return launch(self._lane, name, data, start)

    def _reduce_scatter(self, name: str, data: torch.Tensor) -> Handle:
        scale, segment, is_ordered = self._scale, self._segment_nbytes, self._is_ordered
        bounds = chunk_bounds(data.numel(), self._lane.link.size)

        def start(link: Link, flat: torch.Tensor, tag: int) -> Steps:
            return select.reduce_scatter(link, flat, bounds, ReduceOp.SUM, tag, scale, segment, is_ordered)

        return launch(self._lane, name, data, start)
