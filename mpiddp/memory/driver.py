"""What is asked of torch.cuda, so that tests can put a device in its place that notices every read before the event
that orders it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

__all__ = ["Cuda", "Driver", "Event", "Stream"]


class Event(Protocol):
    """A point in the work of a stream, as torch.cuda.Event is."""

    def query(self) -> bool:
        """Whether the work up to it is done; the host may then read what that wrote."""
        ...

    def synchronize(self) -> None:
        """Block until it is done: never inside an exchange."""
        ...


class Stream(Protocol):
    """Work in order, as torch.cuda.Stream is."""

    def record_event(self) -> Event:
        """An event behind all that is enqueued so far."""
        ...

    def wait_event(self, event: Any) -> None:
        """What is enqueued from now on runs behind ``event``; the host does not wait."""
        ...


class Driver(Protocol):
    """What is asked of torch.cuda."""

    def current(self, device: torch.device) -> Stream:
        """The calling thread's stream on ``device``."""
        ...

    def make_stream(self, device: torch.device) -> Stream:
        """A new one of high priority: its small kernels and copies go before the blocks of a large kernel that waits
        for room."""
        ...

    def handle(self, stream: Stream) -> int:
        """The address of the driver's stream, for other libraries."""
        ...

    def uuid(self, device: torch.device) -> str:
        """By which two processes know that they mean one GPU."""
        ...

    def mark(self, stream: Stream) -> Any:
        """An event behind all that is enqueued so far; ``first.elapsed_time(second)`` are the milliseconds between two
        that are done."""
        ...

    def on(self, stream: Stream) -> AbstractContextManager[Any]:
        """A context in which ``stream`` is the current one, and its device the current device."""
        ...

    def is_capturing(self, device: torch.device) -> bool:
        """Whether the calling thread's stream on ``device`` records a CUDA graph."""
        ...

    def keep(self, tensor: torch.Tensor, stream: Stream) -> None:
        """``stream`` uses the tensor: its memory is not handed out again before that has ended."""
        ...

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Between the device and pinned memory, on the current stream; the host goes on."""
        ...

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Host memory, as bytes, that the device copies from and to by itself while the host goes on."""
        ...


class Cuda:
    """torch.cuda as a :class:`Driver`."""

    def current(self, device: torch.device) -> Stream:
        """See :class:`Driver`."""
        return torch.cuda.current_stream(device)

    def make_stream(self, device: torch.device) -> Stream:
        """See :class:`Driver`."""
        return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def handle(self, stream: Stream) -> int:
        """See :class:`Driver`."""
        return int(stream.cuda_stream)  # type: ignore[attr-defined]

    def uuid(self, device: torch.device) -> str:
        """See :class:`Driver`."""
        return str(torch.cuda.get_device_properties(device).uuid)

    def mark(self, stream: Stream) -> Any:
        """See :class:`Driver`."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(stream)  # type: ignore[arg-type]
        return event

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """See :class:`Driver`.

        The thread may never have used its current device (the liveness thread's is device 0 on every rank). Leaving
        torch.cuda.stream() would set that device again, which makes a context there; leaving torch.cuda.device() does
        not, and between the two the device does not change.
        """
        device: torch.device = stream.device  # type: ignore[attr-defined]
        with torch.cuda.device(device), torch.cuda.stream(stream):  # type: ignore[arg-type]
            yield

    def is_capturing(self, device: torch.device) -> bool:
        """See :class:`Driver`."""
        with torch.cuda.device(device):
            return torch.cuda.is_current_stream_capturing()

    def keep(self, tensor: torch.Tensor, stream: Stream) -> None:
        """See :class:`Driver`."""
        try:
            tensor.record_stream(stream)  # type: ignore[arg-type]
        except RuntimeError:
            # This allocator refuses memory that is not its own; such memory is kept by its owner.
            if torch.cuda.get_allocator_backend() != "cudaMallocAsync":
                raise

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """See :class:`Driver`."""
        target.copy_(source, non_blocking=True)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """See :class:`Driver`."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
