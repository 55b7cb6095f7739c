"""Who a child process is told to be."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from mpiddp import config, processes, worker
from mpiddp.worker import Topology

TOPOLOGY = Topology(5, 8, 1, 4, 1, 2, True)


@pytest.fixture(autouse=True)
def published() -> Iterator[None]:
    worker.publish(TOPOLOGY)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        worker.publish_signals([number])
    yield
    worker.withdraw()
    config.remove(["_MPIDDP_SIGNALS"])


def test_a_multiprocessing_child_is_told() -> None:
    assert worker.inherited(config.environ(), creator_pid=os.getpid()) == TOPOLOGY
    worker.withdraw()
    assert worker.inherited(config.environ(), creator_pid=os.getpid()) is None


def test_this_process_is_no_child() -> None:
    assert worker.inherited(config.environ()) is None


def test_another_creator_does_not_count() -> None:
    """A plain subprocess of a rank, with workers of its own, hands the rank's variable down."""
    assert worker.inherited(config.environ(), creator_pid=os.getpid() + 1) is None


@pytest.mark.parametrize("name", ["PMIX_RANK", "PMI_RANK", "PMI_FD"])
def test_a_launcher_that_starts_a_process_anew_has_the_word(name: str) -> None:
    assert worker.inherited({**config.environ(), name: "3"}, creator_pid=os.getpid()) is None


@pytest.mark.parametrize("value", ["", "1,2", "1,2,3,4,5,6,7,x", "1,2,3,4,5,6,7,8,9"])
def test_what_cannot_be_read_does_not_count(value: str) -> None:
    assert worker.inherited({"_MPIDDP_WORLD": value}, creator_pid=1) is None


def test_a_plain_subprocess_is_told_nothing() -> None:
    code = "from mpiddp import config, processes, worker; print(worker.inherited(config.environ()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "None"


def _tell(queue: multiprocessing.Queue[Topology | None]) -> None:
    queue.put(worker.inherited(config.environ()))


def _hear(queue: multiprocessing.Queue[object]) -> None:
    queue.put([signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2)])


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_children_started_anew_do_not_die_of_what_the_rank_awaits(method: str) -> None:
    context = multiprocessing.get_context(method)
    queue: multiprocessing.Queue[object] = context.Queue()
    child = context.Process(target=_hear, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == [signal.SIG_IGN, signal.SIG_DFL, signal.SIG_DFL]
    child.join()


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_children_of_every_kind(method: str) -> None:
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_tell, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == TOPOLOGY
    child.join()


def test_a_fork_knows_that_it_is_one() -> None:
    parent = processes.generation()
    if not (pid := os.fork()):
        os._exit(0 if processes.generation() != parent else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert processes.generation() == parent
