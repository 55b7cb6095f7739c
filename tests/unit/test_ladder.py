"""Waiting: for how long a core is given away or slept, and what wakes who waits."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mpiddp.engine import ladder
from mpiddp.transport.doorbell import Doorbell


class Rests:
    """A clock that only rests move, and what they were."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1.0
        self.slept: list[float] = []
        monkeypatch.setattr(ladder.os, "sched_yield", lambda: self.passes(1e-5))
        monkeypatch.setattr(ladder.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.passes(seconds)

    def passes(self, seconds: float) -> None:
        self.now_s += seconds

    def wait(self, waiting: ladder.Ladder, seconds: float) -> list[float]:
        """The sleeps of a wait for what comes after so long."""
        self.slept.clear()
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            waiting.rest(self.now_s)
        waiting.moved(self.now_s)
        return list(self.slept)


class Bell(Doorbell):
    """Rings or does not, and takes no time."""

    def __init__(self, rests: Rests, rings: bool) -> None:
        super().__init__([0])
        self.rests, self.rings, self.waits = rests, rings, 0

    def wait(self, timeout_s: float) -> None:
        self.waits += 1
        self._has_rung = self.rings
        self.rests.passes(1e-4 if self.rings else timeout_s)


@pytest.fixture
def rests(monkeypatch: pytest.MonkeyPatch) -> Rests:
    return Rests(monkeypatch)


def test_on_a_node_a_core_is_given_away_before_one_sleeps(rests: Rests) -> None:
    waiting = ladder.Ladder()
    assert rests.wait(waiting, 0.015) == []
    assert set(rests.wait(waiting, 0.05)) == {0.0002}


def test_who_waits_for_a_slow_link_sleeps_sooner_and_for_longer(rests: Rests) -> None:
    waiting = ladder.BetweenHosts(rests.now_s)
    first = rests.wait(waiting, 0.004)
    for _ in range(9):
        last = rests.wait(waiting, 0.004)
    assert sum(first) < 0.0015 and sum(last) > 0.0035, "the core is given away for less and less"
    rests.passes(1.0)
    assert max(rests.wait(waiting, 0.05)) == 0.001, "after a second, for a millisecond at a time"
    for _ in range(9):
        rests.wait(waiting, 0.00001)
    assert rests.wait(waiting, 0.0025) == [], "and for long again where everything comes at once"


def test_where_a_bell_rings_nobody_yields_or_sleeps_but_for_long_messages(rests: Rests) -> None:
    bell = Bell(rests, rings=True)
    waiting = ladder.AtTheDoor(rests.now_s, bell)
    assert rests.wait(waiting, 0.001) == [] and bell.waits == 10
    assert rests.wait(waiting, 0.01), "what comes slowly would ring again and again"
    bell.waits = 0
    assert rests.wait(waiting, 0.004) and not bell.waits and waiting.spins == 1
    rests.wait(waiting, 0.0002)
    rests.wait(waiting, 0.0002)
    assert bell.waits and waiting.spins == 2, "what comes quickly is listened for again"


def test_a_bell_that_stays_silent_is_listened_to_no_more(rests: Rests) -> None:
    bell = Bell(rests, rings=False)
    for _ in range(16):
        waiting = ladder.ladder_for(rests.now_s, True, bell)
        rests.wait(waiting, 0.0008)
    assert bell.waits == 4 and not bell.is_trusted and type(waiting) is ladder.BetweenHosts


def test_a_bell_that_now_and_then_misses_one_is_still_trusted(rests: Rests) -> None:
    bell = Bell(rests, rings=True)
    for number in range(2000):
        bell.rings = number % 10 != 9
        rests.wait(ladder.ladder_for(rests.now_s, True, bell), 0.0001)
    assert bell.is_trusted


def test_work_on_a_gpu_and_on_a_node_rings_no_bell(rests: Rests, monkeypatch: pytest.MonkeyPatch) -> None:
    bell = Bell(rests, rings=True)
    assert type(ladder.ladder_for(0.0, False, bell)) is ladder.Ladder
    assert type(ladder.ladder_for(0.0, True, None)) is ladder.BetweenHosts
    assert type(ladder.ladder_for(0.0, True, bell)) is ladder.AtTheDoor
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert type(ladder.ladder_for(0.0, True, bell)) is ladder.BetweenHosts


@pytest.fixture
def connections() -> Iterator[tuple[Any, socket.socket]]:
    """An epoll instance as Open MPI's: a socket that listens and one that is connected; and the other end of it."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        select.epoll() as found,
        socket.create_connection(server.getsockname()) as client,
        server.accept()[0] as accepted,
    ):
        found.register(server, select.EPOLLIN)
        found.register(accepted, select.EPOLLIN)
        yield found, client


def test_the_sockets_of_mpi_are_found_and_ring(connections: tuple[Any, socket.socket]) -> None:
    epoll, client = connections
    with select.epoll() as other:  # of a client: it holds no socket that listens
        other.register(client, select.EPOLLIN)
        bell = Doorbell.of_mpi()
    assert bell.is_trusted and f"[{epoll.fileno()}]" in repr(bell)
    start = time.perf_counter()
    bell.wait(0.02)
    assert time.perf_counter() - start > 0.015
    threading.Timer(0.05, client.send, (b"!",)).start()
    start = time.perf_counter()
    bell.wait(20.0)
    assert time.perf_counter() - start < 10.0
    bell.came()
    assert "credit 17" in repr(bell)


def test_a_bell_is_silent_where_there_is_none_and_after_it_was_closed() -> None:
    assert not Doorbell.of_mpi().is_trusted
    closed = os.open(os.devnull, os.O_RDONLY)
    bell = Doorbell([closed])
    os.close(closed)
    bell.wait(5.0)
    assert not bell.is_trusted
    assert not Doorbell([5000]).is_trusted, "select cannot"
