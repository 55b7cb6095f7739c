"""cupy.cuda.nccl over the fake device, for all ranks of a node: addresses in, and what a kernel would do out.

A collective runs when the last rank has enqueued it: until then whatever is recorded behind it on the streams is not
done. The ranks' calls of one communicator belong together by their order alone, as with NCCL; calls that belong
together and are not the same fail the test, where NCCL would hang or add what does not belong together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.fake_device import Clock, FakeDriver, FakeStream

_DTYPES = {
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FLOAT16": torch.float16,
    "FLOAT32": torch.float32,
    "FLOAT64": torch.float64,
    "BFLOAT16": torch.bfloat16,
}
_OPS = {"SUM": torch.add, "PROD": torch.mul, "MIN": torch.minimum, "MAX": torch.maximum}


class Failure(RuntimeError):
    """As cupy's NcclError."""


class Work:
    """One rank's part of a collective. ``clock``: what comes behind it, once it has run."""

    def __init__(
        self, what: tuple[Any, ...], stream: FakeStream, source: torch.Tensor, run: Callable[[Sequence[Work]], None]
    ) -> None:
        self.what, self.stream, self.source, self.run = what, stream, source, run
        self.clock: Clock | None = None
        self.taken = source  # what was in it when the kernels began

    def take(self) -> None:
        self.stream.driver.tracker.access(self.stream, self.source, False)
        self.taken = self.source.clone()


class Node:
    """What the communicators of one node share, by the bytes of the unique id."""

    def __init__(self) -> None:
        self.enqueued: defaultdict[bytes, list[list[Work]]] = defaultdict(list)  # by rank
        self.ids = 0
        self.ran: list[str] = []

    def add(self, uid: bytes, rank: int, size: int, work: Work) -> None:
        ranks = self.enqueued[uid] = self.enqueued[uid] or [[] for _ in range(size)]
        ranks[rank].append(work)
        number = len(ranks[rank]) - 1
        if all(len(each) > number for each in ranks):
            self._run([each[number] for each in ranks])

    def _run(self, works: list[Work]) -> None:
        assert len({work.what for work in works}) == 1, f"enqueued in different orders: {[w.what for w in works]}"
        self.ran.append(works[0].what[0])
        for work in works:  # the kernels wait for each other
            for other in works:
                work.stream.follow(other.stream.clock)
        tracker = works[0].stream.driver.tracker
        agents, tracker.agents = tracker.agents, []  # what the fake itself computes is free
        for work in works:
            work.take()
        for work in works:
            work.run(works)
        tracker.agents = agents
        for work in works:
            work.clock = dict(work.stream.clock)


class Library:
    """The module, as one rank sees it."""

    available = True
    NcclError = Failure

    def __init__(self, node: Node, driver: FakeDriver) -> None:
        self.node, self.driver = node, driver
        self.group: list[Callable[[], None]] | None = None
        self.fails_at = ""  # the call that raises
        self.closed = ""
        for number, name in enumerate(_DTYPES):
            setattr(self, f"NCCL_{name}", number)
        for number, name in enumerate(_OPS):
            setattr(self, f"NCCL_{name}", number)

    def get_unique_id(self) -> bytes:
        self.node.ids += 1
        return self.node.ids.to_bytes(128, "little")

    def NcclCommunicator(self, size: int, uid: bytes, rank: int) -> Communicator:  # noqa: N802
        self.fail("start")
        return Communicator(self, size, uid, rank)

    def fail(self, call: str) -> None:
        if call == self.fails_at:
            raise Failure("NCCL_ERROR_SYSTEM_ERROR: unhandled system error")

    def groupStart(self) -> None:  # noqa: N802
        self.group = []

    def groupEnd(self) -> None:  # noqa: N802
        assert self.group is not None
        calls, self.group = self.group, None
        for call in calls:
            call()


class Communicator:
    def __init__(self, library: Library, size: int, uid: bytes, rank: int) -> None:
        assert any(uid) and isinstance(uid, bytes)
        self.library, self.size, self.uid, self.rank = library, size, uid, rank

    def _enqueue(self, what: tuple[Any, ...], stream: int, run: Callable[[Sequence[Work]], None], source: Any) -> None:
        self.library.fail(what[0])
        driver = self.library.driver
        on = driver.stream(stream)

        def add() -> None:
            on.follow(driver.host.clock)
            on.last = work = Work(what, on, source, run)
            self.library.node.add(self.uid, self.rank, self.size, work)

        if self.library.group is None:
            add()
        else:
            self.library.group.append(add)

    def _at(self, address: int, numel: int, dtype: int) -> torch.Tensor:
        return self.library.driver.tracker.at(address, numel, list(_DTYPES.values())[dtype])

    def _reduced(self, works: Sequence[Work], op: int, lo: int = 0, hi: int | None = None) -> torch.Tensor:
        """What the inputs add up to."""
        total = works[0].taken[lo:hi].clone()
        for work in works[1:]:
            total = list(_OPS.values())[op](total, work.taken[lo:hi])
        return total

    def _write(self, target: torch.Tensor, values: torch.Tensor, on: int) -> None:
        tracker, stream = self.library.driver.tracker, self.library.driver.stream(on)
        tracker.access(stream, target, True)
        target.copy_(values)

    def allReduce(self, source: int, target: int, numel: int, dtype: int, op: int, stream: int) -> None:  # noqa: N802
        out = self._at(target, numel, dtype)

        def run(works: Sequence[Work]) -> None:
            self._write(out, self._reduced(works, op), stream)

        self._enqueue(("allReduce", numel, dtype, op), stream, run, self._at(source, numel, dtype))

    def reduceScatter(self, source: int, target: int, numel: int, dtype: int, op: int, stream: int) -> None:  # noqa: N802
        out, lo = self._at(target, numel, dtype), self.rank * numel

        def run(works: Sequence[Work]) -> None:
            self._write(out, self._reduced(works, op, lo, lo + numel), stream)

        self._enqueue(("reduceScatter", numel, dtype, op), stream, run, self._at(source, numel * self.size, dtype))

    def reduce(self, source: int, target: int, numel: int, dtype: int, op: int, root: int, stream: int) -> None:
        out = self._at(target, numel, dtype)

        def run(works: Sequence[Work]) -> None:
            if self.rank == root:
                self._write(out, self._reduced(works, op), stream)

        self._enqueue(("reduce", numel, dtype, op, root), stream, run, self._at(source, numel, dtype))

    def allGather(self, source: int, target: int, numel: int, dtype: int, stream: int) -> None:  # noqa: N802
        out = self._at(target, numel * self.size, dtype)

        def run(works: Sequence[Work]) -> None:
            self._write(out, torch.cat([work.taken for work in works]), stream)

        self._enqueue(("allGather", numel, dtype), stream, run, self._at(source, numel, dtype))

    def broadcast(self, source: int, target: int, numel: int, dtype: int, root: int, stream: int) -> None:
        out = self._at(target, numel, dtype)

        def run(works: Sequence[Work]) -> None:
            if self.rank != root:
                self._write(out, works[root].taken, stream)

        self._enqueue(("broadcast", numel, dtype, root), stream, run, self._at(source, numel, dtype))

    def check_async_error(self) -> None:
        self.library.fail("check")

    def destroy(self) -> None:
        self.library.closed = "destroyed"

    def abort(self) -> None:
        self.library.closed = "aborted"
