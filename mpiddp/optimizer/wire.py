"""How a bucket travels: scaled, compressed or as it is, and what comes back into it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..collectives import ReduceOp, select
from ..compression import BF16Compressor, Compression, FP16Compressor
from ..engine import Engine, Handle, Lane
from ..engine.device import launch
from ..transport.base import Link, Steps
from .layout import Bucket
from .options import Options

__all__ = ["Sending", "Wire"]


class Sending:
    """A bucket under way."""

    __slots__ = ("_arrived", "_handles")

    def __init__(self, handles: list[Handle], arrived: Callable[[], None] | None = None) -> None:
        self._handles = handles
        self._arrived = arrived

    def turn(self, engine: Engine) -> None:
        """Where there are two exchanges one after the other: wait for the first and launch the second."""

    def wait(self, engine: Engine) -> None:
        """Until the bucket holds the result; raises what the exchange raised."""
        for handle in self._handles:
            engine.wait(handle)
        if self._arrived is not None:
            self._arrived()


class Wire:
    """Gradients are divided by ``options.predivide`` before the sum; the rest of an average comes after it.

    In float16 a sum could be too large for its type. So gradients are divided, before they are made float16, by the
    least power of two that is not below the number of members (exact, but for what becomes subnormal), unless the
    user divides by something else; what remains of it is made up for in the sum of an average, which is no larger
    than the largest gradient, and in the gradient's own type where the sum itself is wanted.
    """

    def __init__(self, lane: Lane, options: Options) -> None:
        self._lane = lane
        self._compression = options.compression
        predivide = options.predivide
        if options.compression is FP16Compressor and predivide == 1.0:
            predivide = float(1 << (lane.link.size - 1).bit_length())
        self._prescale = 1.0 / predivide
        self._scale = predivide / lane.link.size if options.average else 1.0
        self._gain = 1.0 if options.average else predivide  # after the exchange, in the gradient's own type
        self._segment_nbytes = options.segment_nbytes
        self._is_ordered = options.is_ordered

    @property
    def is_own(self) -> bool:
        """Whether the compressor is the user's, which gets each gradient by itself and in its own shape."""
        return self._compression not in (Compression.none, FP16Compressor, BF16Compressor)

    def launch(self, name: str, bucket: Bucket, factor: float = 1.0) -> Sending:
        """Reduce ``factor`` times the bucket over the members."""
        if self._prescale * factor != 1.0:
            bucket.flat.mul_(self._prescale * factor)
        if self._compression is Compression.none:
            return Sending([self._reduce(name, bucket.flat)])
        if self.is_own:
            return self._launch_own(name, bucket)
        packed, _ = self._compression.compress(bucket.flat)

        def arrived() -> None:
            self._unpack(packed, bucket.flat)

        return Sending([self._reduce(name, packed)], arrived)

    def _unpack(self, packed: torch.Tensor, flat: torch.Tensor) -> None:
        """``packed``, which has arrived, to ``flat``, of which it is a copy in 16 bits, or ``flat`` itself."""
        if packed is not flat:
            flat.copy_(packed)
        if self._gain != 1.0:
            flat.mul_(self._gain)

    def _launch_own(self, name: str, bucket: Bucket) -> Sending:
        (view,) = bucket.views
        packed, context = self._compression.compress(view)
        flat = packed.contiguous().view(-1)
        handles = [self._reduce(name, flat), self._reduce(f"{name}, flags", bucket.tail)]

        def arrived() -> None:
            view.copy_(self._compression.decompress(flat.view(packed.shape), context))

        return Sending(handles, arrived)

    def _reduce(self, name: str, flat: torch.Tensor, scale: float | None = None) -> Handle:
        scale = self._scale if scale is None else scale
        segment, is_ordered = self._segment_nbytes, self._is_ordered

        def start(link: Link, flat: torch.Tensor, tag: int) -> Steps:
            return select.allreduce(link, flat, ReduceOp.SUM, tag, scale, segment, is_ordered)

        return launch(self._lane, name, flat, start)
