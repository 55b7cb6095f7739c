"""Every CUDA stream and event of the library, each with the overlap that it buys.

MPI knows no streams, and a kernel that reads what another stream has not written yet gives wrong sums without a word.
So a tensor is read only behind an event of the stream that made it, nobody blocks on a device while exchanges are
pushed (events are polled), and whoever waits for a result makes his own stream wait, not the device.

The device is reached through a :class:`Driver`, so that tests can put one in its place that notices every read before
the event that orders it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar

import torch

from ..errors import MpiddpError
from .driver import Cuda, Driver, Event, Stream

__all__ = ["Cuda", "Device", "Devices", "Driver", "Event", "Makers", "Passage", "Stream", "on_exchange_streams"]

_T = TypeVar("_T")


class Device:
    """The streams of one device. Each buys an overlap:

    - ``exchange``: additions, and copies into and out of fused buffers, run beside backward, which goes on on the
      user's stream;
    - ``out``: the copy of the next segment to the host runs beside the addition of this one;
    - ``back``: the copy of a segment from the host runs beside both: GPUs copy in both directions at once.
    """

    def __init__(self, driver: Driver, device: torch.device) -> None:
        self.driver, self.device = driver, device
        self.exchange, self.out, self.back = (driver.make_stream(device) for _ in range(3))
        self.times: list[tuple[Any, Any]] | None = (
            None  # of who wants to know what kernels take: marks before and after
        )

    def timed(self, work: Callable[[], _T]) -> _T:
        """``work()``, which enqueues on the exchange stream, between two marks where somebody wants to know."""
        if self.times is None:
            return work()
        began = self.driver.mark(self.exchange)
        result = work()
        self.times.append((began, self.driver.mark(self.exchange)))
        return result

    def handle(self) -> int:
        """That of the exchange stream."""
        return self.driver.handle(self.exchange)

    def __repr__(self) -> str:
        return f"Device({self.device})"


class Devices:
    """The devices that this process exchanges tensors of, found as they come."""

    def __init__(self, driver: Driver | None = None) -> None:
        self.driver: Driver = Cuda() if driver is None else driver
        self.own: int | None = None  # the number of this rank's, where it has one
        self._by_device: dict[torch.device, Device] = {}

    def of(self, tensor: torch.Tensor) -> Device:
        """The streams of the device that ``tensor`` lies on."""
        return self.of_device(tensor.device)

    def of_device(self, device: torch.device) -> Device:
        """The streams of ``device``."""
        found = self._by_device.get(device)
        if found is None:
            found = self._by_device[device] = Device(self.driver, device)
        return found

    def depart(self, tensor: torch.Tensor) -> Passage:
        """``tensor`` is handed over to an exchange, by the thread whose stream made it."""
        self.refuse_capture(tensor)
        return Passage(self.of(tensor), tensor)

    def refuse_capture(self, tensor: torch.Tensor) -> None:
        """MpiddpError while the calling thread captures a CUDA graph."""
        if self.driver.is_capturing(tensor.device):
            raise MpiddpError(
                f"a tensor on {tensor.device} was handed to a collective while a CUDA graph is captured: an exchange "
                "needs the host between its steps, so it cannot be part of a graph. Capture forward and backward "
                "without the exchange, or do not capture"
            )

    @property
    def home(self) -> torch.device:
        """A device that this process uses: the first that a tensor came from, or its own. Not the current one: the
        liveness thread's is cuda:0 on every rank."""
        own = "cuda" if self.own is None else f"cuda:{self.own}"
        return next(iter(self._by_device), torch.device(own))

    def __repr__(self) -> str:
        return f"Devices({', '.join(str(device) for device in self._by_device) or 'none used'})"


class Passage:
    """A tensor's way through an exchange: made on the caller's stream, worked on on the exchange's, and visible to
    whoever waits for it. The exchange keeps ``tensor`` alive until then."""

    __slots__ = ("_done", "_made", "_result", "device", "tensor")

    def __init__(self, device: Device, tensor: torch.Tensor) -> None:
        self.device, self.tensor = device, tensor
        # Overlap: the exchange waits for what made this tensor, and not for what the caller enqueues behind it.
        self._made = device.driver.current(tensor.device).record_event()
        self._done: Event | None = None
        self._result: tuple[torch.Tensor, ...] = ()

    def begin(self) -> None:
        """What the exchange stream does from now on is behind what made the tensor."""
        self.device.exchange.wait_event(self._made)
        self.device.driver.keep(self.tensor, self.device.exchange)

    def finish(self, result: object = None) -> None:
        """All work on the result is enqueued on the exchange stream; before anybody is told that it is there."""
        parts = result if isinstance(result, (tuple, list)) else (result,)
        self._result = tuple(part for part in parts if isinstance(part, torch.Tensor) and _is_on(part, self.tensor))
        # Overlap: the caller's stream waits for this exchange alone, not for those behind it.
        self._done = self.device.exchange.record_event()

    def land(self) -> None:
        """The calling thread's stream sees the result from here on; the host does not wait."""
        if self._done is None:  # it failed
            return
        stream = self.device.driver.current(self.device.device)
        stream.wait_event(self._done)
        for tensor in self._result:  # it may have been allocated on the exchange stream
            self.device.driver.keep(tensor, stream)
        self._result = ()


def _is_on(part: torch.Tensor, like: torch.Tensor) -> bool:
    return part.device == like.device


def on_exchange_streams(passages: Iterable[Passage]) -> AbstractContextManager[Any]:
    """A context in which each device's exchange stream is its current one; the first passage's device is current."""
    devices = {id(passage.device): passage.device for passage in passages}
    if len(devices) == 1:
        (device,) = devices.values()
        return device.driver.on(device.exchange)
    stack = ExitStack()
    for device in reversed(devices.values()):
        stack.enter_context(device.driver.on(device.exchange))
    return stack


class Makers:
    """Which streams wrote into which bucket: autograd accumulates each gradient on the stream of its own forward."""

    def __init__(self, devices: Devices, buckets: Iterable[torch.Tensor]) -> None:
        """``buckets`` are new, and filled with zeros by the calling thread's streams."""
        self._driver = devices.driver
        for device in {bucket.device for bucket in buckets}:
            # No overlap to gain: buckets are made once or twice. Other streams may write them from here on.
            self._driver.current(device).record_event().synchronize()
        self._streams: dict[int, list[Stream]] = {}

    def note(self, bucket: int, tensor: torch.Tensor) -> None:
        """The calling thread's stream has written ``tensor``, a part of the bucket."""
        stream = self._driver.current(tensor.device)
        streams = self._streams.setdefault(bucket, [])
        if stream not in streams:
            streams.append(stream)

    def gather(self, bucket: int, tensor: torch.Tensor) -> None:
        """The calling thread's stream is behind all that was written into the bucket."""
        own = self._driver.current(tensor.device)
        for stream in self._streams.pop(bucket, ()):
            if stream != own:
                # Overlap: gradients of several streams are packed side by side, and only the bucket's departure waits.
                own.wait_event(stream.record_event())
                self._driver.keep(tensor, stream)
