"""Who is missing: what ranks publish, how a stack is had from a rank that holds the GIL, and who reports what when."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from mpiddp.engine import Presence, stack
from mpiddp.engine.presence import LEFT, WAITING
from mpiddp.engine.stall import StallCheck
from mpiddp.errors import StallError
from mpiddp.memory import shared as page
from mpiddp.memory.shared import HEADER_NBYTES
from mpiddp.transport.base import Steps
from tests.simulated_world import World


def presences(size: int) -> list[Presence]:
    memory = bytearray(HEADER_NBYTES + 512 * size)
    return [Presence(memory, range(size), rank) for rank in range(size)]


# -- the page ----------------------------------------------------------------------------------------------------------


def test_a_peer_sees_what_a_rank_publishes() -> None:
    mine, other = presences(2)
    now = time.monotonic()
    for name in ("first", "layer.weight"):
        mine.submitted(name, 0, now)
    mine.push_ends(now)
    mine.push_begins()
    mine.phase(WAITING, now)
    mine.words[mine.lane(77)] = 5
    mine.step(3)
    seen = other.see(0)
    assert seen is not None and seen.is_alive and seen.pid == os.getpid()
    assert (seen.submitted, seen.name, seen.submitted_s) == (2, "layer.weight", now)
    assert (seen.phase, seen.since_s, seen.in_push, seen.pushed_s) == (WAITING, now, True, now)
    assert (seen.step, dict(seen.lanes)) == (3, {77: 5})
    mine.close()
    assert other.see(0).phase == LEFT and other.see(1).submitted == 0 and other.see(2) is None


def test_long_names_are_cut_between_characters_and_lanes_are_bounded() -> None:
    mine, other = presences(2)
    mine.submitted("é" * 500, 0, 1.0)
    assert set(other.see(0).name) == {"é", "."} and 50 < len(other.see(0).name) < 500
    for key in range(1, 30):
        mine.words[mine.lane(key)] = key
    assert dict(other.see(0).lanes) == {key: key for key in range(1, 11)}
    assert other.see(1).lanes == {} and other.see(1).pid == os.getpid()


def test_publishing_costs_less_than_a_microsecond() -> None:
    mine, _ = presences(2)
    calls = {
        "submitted": lambda: mine.submitted("layer.weight", 0, 1.0),
        "push": lambda: (mine.push_begins(), mine.push_ends(1.0)),
        "phase": lambda: mine.phase(WAITING, 1.0),
    }
    for name, call in calls.items():
        best_s = min(timed(call, 2000) for _ in range(20))
        assert best_s < 2e-6, f"{name} takes {best_s * 1e6:.2f} us"  # twice the aim: the machine may be busy


def timed(call: Any, times: int) -> float:
    begun = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - begun) / times


class Node:
    """A communicator between threads, for the few calls that agreeing on shared memory needs."""

    def __init__(self, size: int) -> None:
        self.size, self.values, self.barrier = size, [None] * size, threading.Barrier(size)

    def run(self, call: Any) -> list[Any]:
        results: list[Any] = [None] * self.size

        def body(rank: int) -> None:
            results[rank] = call(Comm(self, rank))

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        return results


class Comm:
    def __init__(self, node: Node, rank: int) -> None:
        self.node, self.rank, self.size = node, rank, node.size

    def allgather(self, value: Any) -> list[Any]:
        self.node.values[self.rank] = value
        self.node.barrier.wait()
        values = list(self.node.values)
        self.node.barrier.wait()
        return values

    def bcast(self, value: Any, root: int) -> Any:
        return self.allgather(value)[root]


def refuse(*_: Any) -> Any:
    raise OSError("refused on purpose")


def test_memory_is_shared_by_a_nameless_file_or_else_by_one_that_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        first, second = Node(2).run(lambda comm: page.share(comm, 4096))
        first[1000] = 7
        assert second[1000] == 7 and len(second) == 4096 and not any(second[HEADER_NBYTES:1000])
        monkeypatch.setattr(os, "memfd_create", refuse)


def test_where_nothing_can_be_shared_all_ranks_know(monkeypatch: pytest.MonkeyPatch) -> None:
    real = page._map
    monkeypatch.setattr(page, "_map", lambda path, token, nbytes: real(path, b"another token", nbytes))
    assert Node(2).run(lambda comm: page.share(comm, 4096)) == [None, None]
    assert Node(1).run(lambda comm: page.share(comm, 4096)) != [None]


# -- stacks ------------------------------------------------------------------------------------------------------------

PEER = """
import ctypes, os, sys, threading
from mpiddp.engine import stack

number, fd = stack.install()
threading.Thread(target=threading.Event().wait, daemon=True).start()

def hold_the_gil():
    print(os.getpid(), number, fd, flush=True)
    sleep = ctypes.PyDLL(None).usleep
    for _ in range(100):
        sleep(500_000)  # a signal ends it early

hold_the_gil()
"""


@pytest.fixture
def started() -> Iterator[Any]:
    """Starts Python programs, and ends them."""
    processes: list[subprocess.Popen[str]] = []

    def start(code: str) -> subprocess.Popen[str]:
        processes.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def page_of(pid: int, number: int, fd: int) -> Presence:
    (presence,) = presences(1)
    presence.words[0], presence.words[1] = pid, stack.start_time(pid)
    presence.words[6], presence.words[7] = number, fd
    return presence


def test_the_stack_of_a_process_that_holds_the_gil(started: Any) -> None:
    process = started(PEER)
    presence = page_of(*map(int, process.stdout.readline().split()))
    peer = presence.see(0)
    assert peer.pid == process.pid and peer.is_alive
    for _ in range(2):
        lines = stack.of_peer(peer)
        assert lines[0].endswith("in hold_the_gil") and lines[1].endswith("in <module>") and len(lines) == 2
    process.kill()
    process.wait()
    assert not presence.see(0).is_alive and stack.of_peer(peer) == stack.of_peer(presence.see(0)) == []


def test_no_signal_is_sent_to_a_process_that_does_not_handle_it(started: Any) -> None:
    process = started("import time; print(flush=True); time.sleep(60)")
    process.stdout.readline()
    assert stack.of_peer(page_of(process.pid, signal.SIGRTMAX - 1, 1).see(0)) == []
    time.sleep(0.1)
    assert process.poll() is None


def test_a_signal_of_the_users_is_left_alone() -> None:
    free = stack.install()
    assert free is not None
    stack.uninstall()
    before = signal.signal(free[0], lambda *_: None)
    try:
        other = stack.install()
        assert other is not None and other[0] != free[0]
        stack.uninstall()
    finally:
        signal.signal(free[0], before)
    again = stack.install()
    assert again is not None and again[0] == free[0]
    stack.uninstall()


# -- who reports what --------------------------------------------------------------------------------------------------


class Ranks(World):
    """A simulated world with a page, and a clock for the checks that is moved by hand."""

    def __init__(self, size: int, warn_s: float = 10.0, abort_s: float = 0.0, **more: Any) -> None:
        super().__init__(size, **more)
        self.now = time.monotonic()
        self.pages = presences(size)
        self.checks: list[StallCheck] = []
        for engine, presence in zip(self.engines, self.pages, strict=True):
            channels, engine.channels = engine.channels, []
            engine.observe(presence, warn_s, abort_s)
            for channel in channels:
                engine.add(channel)
            assert engine._stalls is not None
            self.checks.append(engine._stalls)

    def settle(self, *idle: int) -> None:
        """Deliver everything; ranks in ``idle`` push nothing."""
        for _ in range(20):
            for rank, engine in enumerate(self.engines):
                if rank not in idle:
                    engine.push()
            while self._events:
                self._happens_now()

    def _happens_now(self) -> None:
        import heapq

        _, _, what, more = heapq.heappop(self._events)
        if more is not None:
            what.arrived.append(more)
        else:
            self.network.complete(what)

    def pass_time(self, seconds: float, *idle: int) -> None:
        """``seconds`` go by; every rank but those in ``idle`` pushes, and looks once a second."""
        for _ in range(round(seconds)):
            self.now += 1
            for rank, check in enumerate(self.checks):
                if rank not in idle:
                    self.pages[rank].push_ends(self.now)
                    check.check(self.now)
            self.settle(*idle)


@pytest.fixture
def said() -> Iterator[Any]:
    """What was reported since it was called last."""
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]

    def since() -> list[str]:
        found = list(texts)
        texts.clear()
        return found

    logger = logging.getLogger("mpiddp")
    logger.addHandler(handler)
    yield since
    logger.removeHandler(handler)


def test_the_coordinator_names_the_missing_once_and_again_much_later(said: Any) -> None:
    world = Ranks(3)
    handles = [world.allreduce(rank, name, [1.0]) for rank in (0, 2) for name in "ab"]
    world.settle()
    world.pass_time(8)
    assert said() == []
    world.pass_time(5)
    (text,) = said()
    assert "for allreduce 'a', allreduce 'b': rank 1 is missing, ranks 0, 2 wait" in text
    assert "rank 1 has not submitted it" in text and "nothing submitted yet" in text
    world.pass_time(20)
    assert said() == []
    world.pass_time(20)
    assert len(said()) == 1
    handles += [world.allreduce(1, name, [1.0]) for name in "ab"]
    world.settle()
    assert all(handle.done and handle.error is None for handle in handles)
    world.pass_time(100)
    assert said() == []


def test_where_the_coordinator_is_missing_the_lowest_that_waits_reports(said: Any) -> None:
    world = Ranks(4)
    for rank in (1, 2, 3):
        world.allreduce(rank, "x", [1.0])
    world.settle(0)
    world.pass_time(30, 0)
    (text,) = said()
    assert "for allreduce 'x': rank 0 is missing, ranks 1-3 wait" in text and "coordinates this" in text


def test_a_coordinator_that_speaks_is_not_reported(said: Any) -> None:
    world = Ranks(3)
    for rank in (1, 2):
        world.allreduce(rank, "x", [1.0])
    world.allreduce(0, "y", [1.0])
    world.settle()
    world.pass_time(30)
    assert sorted(text.splitlines()[0].partition("for ")[2] for text in said()) == [
        "allreduce 'x': rank 0 is missing, ranks 1-2 wait",
        "allreduce 'y': ranks 1-2 are missing, rank 0 waits",
    ]


def never() -> Steps:
    while True:
        yield None


def test_a_lane_that_does_not_move(said: Any) -> None:
    world = Ranks(3)
    lanes = [channel.lane() for channel in world.channels]
    for lane in lanes:
        lane.begin_cycle()
    launched = [lanes[rank].launch("bucket 0", lambda link, tag: never()) for rank in (0, 2)]
    world.settle()
    world.pass_time(30)
    (text,) = said()
    assert "the gradients of a DistributedOptimizer (bucket 0): rank 1 is missing, ranks 0, 2 wait" in text
    assert "rank 1 has launched 0 of the 1 exchanges that the others have, in its step 1" in text
    assert not any(handle.done for handle in launched)


def test_giving_up_is_the_same_on_all_ranks_and_the_late_one_gets_the_error_too(said: Any) -> None:
    world = Ranks(3, warn_s=0.0, abort_s=10.0)
    handles = [world.allreduce(rank, "x", [1.0]) for rank in (0, 1)]
    world.settle()
    world.pass_time(9)
    assert not any(handle.done for handle in handles)
    world.pass_time(4)
    late = world.allreduce(2, "x", [1.0])
    again = [world.allreduce(rank, "x", [1.0]) for rank in range(3)]
    world.settle()
    for handle in (*handles, late):
        assert isinstance(handle.error, StallError) and "rank 2 is missing" in str(handle.error)
    assert [handle.result.item() for handle in again] == [3.0] * 3


@pytest.mark.parametrize("late", [0, 2])
def test_who_is_patient_does_not_give_up(said: Any, late: int) -> None:
    """Ranks wait for one that writes a checkpoint, which takes longer than they wait for others."""
    world = Ranks(3, warn_s=5.0, abort_s=10.0)
    handles = [world.allreduce(rank, "x", [1.0]) for rank in range(3) if rank != late]
    world.settle()
    with contextlib.ExitStack() as stack:
        for engine in world.engines:
            stack.enter_context(engine.patient())
        world.pass_time(60, *([late] if late == 0 else []))
        assert not any(handle.done for handle in handles) and said(), "it is reported all the same"
        handles.append(world.allreduce(late, "x", [1.0]))
        world.settle()
    assert [handle.result.item() for handle in handles] == [3.0] * 3
    again = world.allreduce((late + 1) % 3, "y", [1.0])
    world.pass_time(14)
    assert isinstance(again.error, StallError)


def test_giving_up_where_the_coordinator_is_missing_and_where_an_exchange_does_not_move(said: Any) -> None:
    world = Ranks(3, warn_s=0.0, abort_s=10.0)
    lanes = [channel.lane() for channel in world.channels]
    handles = [world.allreduce(rank, "x", [1.0]) for rank in (1, 2)]
    handles += [lanes[rank].launch("bucket 0", lambda link, tag: never()) for rank in (1, 2)]
    world.settle(0)
    world.pass_time(30, 0)
    assert all(isinstance(handle.error, StallError) and "rank 0 is missing" in str(handle.error) for handle in handles)
    late = world.allreduce(0, "x", [1.0])
    world.settle()
    assert late.result.item() == 3.0  # the others take part in what they have announced


def test_nothing_is_looked_at_where_nothing_is_to_be_said() -> None:
    (presence,) = presences(1)
    world = World(1)
    assert StallCheck(world.engines[0], presence, 0.0, 0.0).next_look_s == float("inf")
