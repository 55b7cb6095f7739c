"""How a bucket travels as P and Q: two exchanges, one after the other, and a third for what is not compressed."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...compression import Compression, PowerSGD
from ...engine import Engine, Handle, Lane
from ..layout import Bucket
from ..options import Options
from ..wire import Sending, Wire
from .layout import PowerBucket
from .stacks import orthonormal

__all__ = ["PowerWire"]


class PowerWire(Wire):
    """Buckets travel as they are for ``start_step`` steps, and what came too late for them always does."""

    def __init__(self, lane: Lane, options: Options) -> None:
        super().__init__(lane, replace(options, compression=Compression.none))
        assert isinstance(options.compression, PowerSGD)
        self.chosen = options.compression
        self._before = 0
        #: What means are multiplied by in the end. P and Q are means whatever is wanted of the gradients.
        self.gain = self._scale * lane.link.size

    @property
    def steps(self) -> int:
        """How many steps have been made or begun, those before a restart included."""
        return self._lane.cycle + self._before

    @steps.setter
    def steps(self, steps: int) -> None:
        self._before = steps - self._lane.cycle

    def launch(self, name: str, bucket: Bucket, factor: float = 1.0) -> Sending:
        """Reduce ``factor`` times the bucket over the members. The ranks count steps alike, a joined one too."""
        if not isinstance(bucket, PowerBucket) or self.steps <= self.chosen.start_step:
            return super().launch(name, bucket, factor)
        if self._prescale * factor != 1.0:
            bucket.flat.mul_(self._prescale * factor)
        with torch.autocast(bucket.flat.device.type, enabled=False):
            for stack in bucket.stacks:
                stack.project(bucket.flat)
        p = self.mean(f"{name}, P", bucket.p)
        return _Factors(self, name, bucket, p, self._reduce(f"{name}, uncompressed", bucket.rest))

    def mean(self, name: str, flat: torch.Tensor) -> Handle:
        """``flat`` is on its way to becoming its mean over the members."""
        return self._reduce(name, flat, 1.0 / self._lane.link.size)


class _Factors(Sending):
    """A bucket under way as P, then as Q."""

    __slots__ = ("_bases", "_bucket", "_name", "_p", "_q", "_wire")

    def __init__(self, wire: PowerWire, name: str, bucket: PowerBucket, p: Handle, rest: Handle) -> None:
        super().__init__([rest])
        self._wire, self._name, self._bucket = wire, name, bucket
        self._p: Handle | None = p
        self._q: Handle | None = None
        self._bases: list[torch.Tensor] = []

    def turn(self, engine: Engine) -> None:
        """Wait for P and launch Q, where P is finite: it is the same on every rank."""
        if self._p is None:
            return
        engine.wait(self._p)
        self._p = None
        bucket = self._bucket
        if not _is_finite(bucket.p):
            return
        with torch.autocast(bucket.flat.device.type, enabled=False):
            for stack in bucket.stacks:
                self._bases.append(orthonormal(stack.p))
                stack.project_back(self._bases[-1])
        self._q = self._wire.mean(f"{self._name}, Q", bucket.q)

    def wait(self, engine: Engine) -> None:
        """Until the bucket holds the result; raises what an exchange raised."""
        self.turn(engine)
        super().wait(engine)
        bucket, wire = self._bucket, self._wire
        if self._q is not None:
            engine.wait(self._q)
        if self._q is None or not _is_finite(bucket.q):
            for stack in bucket.stacks:
                stack.spoil(bucket.flat, wire.chosen.seed)
            return
        flags = bucket.flags.tolist()
        with torch.autocast(bucket.flat.device.type, enabled=False):
            for stack, basis in zip(bucket.stacks, self._bases, strict=True):
                stack.expand(basis, bucket.flat, wire.gain, flags)


def _is_finite(flat: torch.Tensor) -> bool:
    """Whether all elements are, in a pass over what is small beside the gradients."""
    return bool(torch.isfinite(flat).all())
