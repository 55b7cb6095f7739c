"""A device without a GPU: CPU tensors stand for its memory, and every access is checked against the order that streams
and events give it.

Operations run at once, so results are right whatever the order; what is checked is whether they would be on a device.
Each stream, and each rank's host, is an agent with a vector clock. What a stream does comes after what the host did
before enqueueing it; ``wait_event`` makes a stream, and a ``query`` that says True the host, come after what the event
stands for; a message brings its receiver behind its sender. An access that is not ordered after the last write of the
same bytes, or a write not after all reads of them, raises :class:`Race`.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mpiddp.transport.among import Among
from mpiddp.transport.base import Levels, Pending, nothing_to_move
from mpiddp.transport.device import Ways
from tests.simulation import Network, SimulatedLink

__all__ = ["FakeDriver", "FakeEvent", "FakeLink", "FakeNetwork", "Race", "Tracker"]

Clock = dict[str, int]


class Race(AssertionError):
    """An access that no event orders after another one of the same memory."""


class Agent:
    """Somebody who reads and writes, in an order of his own. ``clock``: how much of whom he comes after."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: Clock = {name: 0}

    def follow(self, clock: Clock) -> None:
        for name, count in clock.items():
            if self.clock.get(name, 0) < count:
                self.clock[name] = count


class FakeEvent:
    """``behind``: work that waits for other ranks, and is done when it has a clock (tests/fake_nccl.py)."""

    def __init__(self, stream: FakeStream) -> None:
        self.clock, self.driver, self.behind = dict(stream.clock), stream.driver, stream.last

    def query(self) -> bool:
        if self.driver.random.random() < 0.5 or (self.behind is not None and self.behind.clock is None):
            return False
        self.synchronize()
        return True

    def synchronize(self) -> None:
        self.driver.host.follow(self.clock)
        if self.behind is not None:
            assert self.behind.clock is not None, "it waits for other ranks"
            self.driver.host.follow(self.behind.clock)

    def elapsed_time(self, other: FakeEvent) -> int:
        """How much any of the streams has done in between."""
        return sum(other.clock.values()) - sum(self.clock.values())


class FakeStream(Agent):
    def __init__(self, name: str, driver: FakeDriver) -> None:
        super().__init__(name)
        self.driver = driver
        self.last: Any = None  # the last work on it that waits for other ranks

    def record_event(self) -> FakeEvent:
        return FakeEvent(self)

    def wait_event(self, event: FakeEvent) -> None:
        self.follow(event.clock)
        self.last = event.behind or self.last


class FakeDriver:
    """One rank's, as mpiddp.memory.streams.Driver has it."""

    def __init__(self, tracker: Tracker, rank: int, seed: int = 0) -> None:
        self.tracker, self.random = tracker, random.Random(seed * 1000 + rank)
        self.host = Agent(f"host {rank}")
        self.user = FakeStream(f"the user's stream on rank {rank}", self)
        self.capturing = False
        self.gpu = f"gpu-{rank}"
        self._rank, self._made = rank, 0
        self._streams: dict[int, FakeStream] = {}

    def current(self, device: torch.device) -> FakeStream:
        mine = [agent for agent in self.tracker.agents if isinstance(agent, FakeStream) and agent.driver is self]
        return mine[-1] if mine else self.user

    def make_stream(self, device: torch.device) -> FakeStream:
        self._made += 1
        return FakeStream(f"stream {self._made} of rank {self._rank}", self)

    def handle(self, stream: FakeStream) -> int:
        self._streams[id(stream)] = stream
        return id(stream)

    def stream(self, handle: int) -> FakeStream:
        return self._streams[handle]

    def uuid(self, device: torch.device) -> str:
        return self.gpu

    def mark(self, stream: FakeStream) -> FakeEvent:
        return FakeEvent(stream)

    def on(self, stream: FakeStream) -> Any:
        return self.tracker.acting(stream)

    def is_capturing(self, device: torch.device) -> bool:
        return self.capturing

    def keep(self, tensor: torch.Tensor, stream: FakeStream) -> None:
        pass

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source)

    def pinned(self, nbytes: int) -> torch.Tensor:
        return self.tracker.put_on_host(torch.empty(nbytes, dtype=torch.uint8))

    def tensor(self, values: torch.Tensor) -> torch.Tensor:
        """A device tensor that the user's stream has filled."""
        tensor = torch.empty_like(values)
        self.tracker.put_on_device(tensor)
        with self.on(self.user):
            tensor.copy_(values)
        return tensor

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the user's stream sees."""
        with self.on(self.user):
            return tensor.clone()


class Tracker(TorchDispatchMode):
    """Knows who did what to which bytes. Only what is done by an agent counts; what the test itself does is free."""

    def __init__(self) -> None:
        super().__init__()
        self.agents: list[Agent] = []
        self._storages: dict[int, Any] = {}  # kept alive, so that no address comes twice
        self._on_device: set[int] = set()
        self._on_host: set[int] = set()  # of pinned memory; any other that meets device memory is on the device, too
        self._accesses: defaultdict[int, list[tuple[int, int, str, int, bool]]] = defaultdict(list)

    def put_on_device(self, tensor: torch.Tensor) -> None:
        self._on_device.add(self._key(tensor))

    def put_on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        self._on_host.add(self._key(tensor))
        return tensor

    @contextmanager
    def acting(self, agent: Agent) -> Iterator[None]:
        self.agents.append(agent)
        try:
            yield
        finally:
            self.agents.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        used = list(_used(func, args, kwargs))
        result = func(*args, **kwargs)
        made = [t for t in (result if isinstance(result, (list, tuple)) else [result]) if isinstance(t, torch.Tensor)]
        keys = {self._key(tensor) for tensor, _ in used}
        is_view = bool(made) and all(self._key(t) in keys for t in made) and not any(write for _, write in used)
        if is_view or not self.agents:
            return result
        is_on_device = bool(keys & self._on_device)
        fresh = [tensor for tensor in made if self._key(tensor) not in keys]
        if is_on_device:
            self._on_device |= (keys | {self._key(tensor) for tensor in fresh}) - self._on_host
        if "empty" in func._schema.name:
            return result
        for tensor, write in [*used, *((tensor, True) for tensor in fresh)]:
            self.access(self._agent(is_on_device), tensor, write)
        return result

    def _agent(self, is_on_device: bool) -> Agent:
        """Who does it: a stream, after what its host has done so far; or the host itself, if it is host memory."""
        agent = self.agents[-1]
        if not isinstance(agent, FakeStream):
            return agent
        if not is_on_device:
            return agent.driver.host
        agent.follow(agent.driver.host.clock)
        return agent

    def access(self, agent: Agent, tensor: torch.Tensor, write: bool) -> None:
        if not tensor.numel():
            return
        lo = tensor.storage_offset() * tensor.element_size()
        span = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        hi = lo + span * tensor.element_size()
        agent.clock[agent.name] += 1
        accesses = self._accesses[self._key(tensor)]
        for at, end, name, count, wrote in accesses:
            if at < hi and lo < end and (write or wrote) and agent.clock.get(name, 0) < count:
                raise Race(
                    f"{agent.name} {'writes' if write else 'reads'} bytes {lo} to {hi} while {name} may still "
                    f"{'write' if wrote else 'read'} {at} to {end}"
                )
        if write:
            accesses[:] = [entry for entry in accesses if not (lo <= entry[0] and entry[1] <= hi)]
        accesses.append((lo, hi, agent.name, agent.clock[agent.name], write))

    def at(self, address: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """The tensor that lies there, for who is given addresses alone."""
        for storage in self._storages.values():
            offset = address - storage.data_ptr()
            if offset >= 0 and offset + numel * dtype.itemsize <= storage.nbytes():
                return torch.empty(0, dtype=dtype).set_(storage, offset // dtype.itemsize, (numel,))
        raise AssertionError(f"no tensor has {numel} elements at {address:#x}")

    def _key(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata if not storage.nbytes() else storage.data_ptr()
        self._storages.setdefault(key, storage)
        return int(key)


def _used(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[torch.Tensor, bool]]:
    """The tensors among the arguments, and whether each is written."""
    for place, argument in enumerate(func._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        write = bool(argument.alias_info and argument.alias_info.is_write)
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, torch.Tensor):
                yield tensor, write


class FakeNetwork(Network):
    """Reads and writes the pieces of a message at the worst time: any between both posts and the completion."""

    def __init__(self, tracker: Tracker, size: int, seed: int = 0) -> None:
        super().__init__(size, seed)
        self.tracker = tracker
        self.drivers = [FakeDriver(tracker, rank, seed) for rank in range(size)]

    def complete(self, key: Any) -> tuple[int, int]:
        source, target = self.sends[key][0], self.recvs[key][0]
        carrier = Agent(f"the network, message {id(source)}")
        for transfer in (source, target):
            carrier.follow(transfer.clock)  # type: ignore[attr-defined]
        self.tracker.access(carrier, source.piece, False)
        self.tracker.access(carrier, target.piece, True)
        source.arrived = target.arrived = carrier.clock  # type: ignore[attr-defined]
        return super().complete(key)

    def fake_links(self, way: Callable[[int, int], str]) -> list[FakeLink]:
        """``way(rank, peer)``, the same for both."""
        return [
            FakeLink(link, driver, partial(way, link.rank))
            for link, driver in zip(self.links(), self.drivers, strict=True)
        ]


class FakeLink:
    """A simulated link whose messages carry their sender's clock."""

    def __init__(self, link: SimulatedLink, driver: FakeDriver, way_to: Callable[[int], str]) -> None:
        self._link, self.driver = link, driver
        self.rank, self.size, self.algorithm = link.rank, link.size, ""
        self.node = self.gpus = self.nccl = None
        self.levels: Levels | None = None
        self.ways = Ways(way_to, driver)

    def among(self, ranks: Sequence[int]) -> Among:
        return Among(self, ranks)  # type: ignore[arg-type]

    def open(self, flat: torch.Tensor) -> _Region:
        return _Region(self._link.open(flat), self.driver)


class _Region:
    def __init__(self, region: Any, driver: FakeDriver) -> None:
        self._region, self._driver = region, driver

    def send(self, lo: int, hi: int, peer: int, tag: int) -> Pending:
        return self._posted(self._region.send(lo, hi, peer, tag))

    def recv(self, lo: int, hi: int, peer: int, tag: int) -> Pending:
        return self._posted(self._region.recv(lo, hi, peer, tag))

    def _posted(self, pending: Any) -> Pending:
        if pending is nothing_to_move:
            return nothing_to_move
        transfer, host = pending.__self__, self._driver.host
        host.clock[host.name] += 1
        transfer.clock = dict(host.clock)

        def test() -> bool:
            if not pending():
                return False
            host.follow(transfer.arrived)
            return True

        return test
