"""A rank that does not come: the others say who it is and what it does, and give up where they were told to."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

#: How long the late one takes, in seconds. That the coordinator is silent is noticed later than who is missing there.
LATE_S, LATE_COORDINATOR_S = 4.0, 7.0


@pytest.fixture
def stalling(begin: Callable[..., Any]) -> Callable[..., Any]:
    """``mpiddp`` that warns after a second, and one operation that is done."""

    def begun(**settings: object) -> Any:
        hvd = begin(**{"STALL_WARN_S": 1, "STALL_ABORT_S": 0} | settings)
        hvd.allreduce(torch.ones(1), name="before")
        return hvd

    return begun


@pytest.fixture
def reports(caplog: pytest.LogCaptureFixture) -> Callable[[Any], list[str]]:
    """The reports of all ranks. Collective."""

    def gather(hvd: Any) -> list[str]:
        said = [record.getMessage() for record in caplog.records if record.name == "mpiddp"]
        return [text for texts in hvd.allgather_object(said) for text in texts if text.startswith("waited")]

    return gather


def one_with(words: str, found: list[str]) -> str:
    """The report that has these words: on a crowded machine whatever comes before may have waited for long, too."""
    assert any(words in each for each in found), f"no report has {words!r}: {found}"
    return next(each for each in found if words in each)


def hold_the_gil(seconds: float) -> None:
    sleep, end = ctypes.PyDLL(None).usleep, time.monotonic() + seconds
    while time.monotonic() < end:  # a signal ends the sleep early
        sleep(int(1e6 * max(0.0, end - time.monotonic())))


def dawdle(seconds: float = LATE_S) -> None:
    time.sleep(seconds)


def make_step(hvd: Any) -> Callable[[], None]:
    model = torch.nn.Linear(4, 4)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))

    def step() -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()

    return step


@pytest.mark.ranks(3)
@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_never_submits(stalling: Any, reports: Any, late: int) -> None:
    hvd = stalling()
    if hvd.rank() == late:
        dawdle()
    hvd.allreduce(torch.ones(1), name="x")
    report = one_with("in dawdle", reports(hvd))
    others = "0, 2" if late else "1-2"
    assert f"for allreduce 'x': rank {late} is missing, ranks {others} wait" in report
    assert f"  rank {late} " in report and "computing, last push" in report and "the last 'before'" in report
    assert "has not submitted it" in report


@pytest.mark.ranks(2)
@pytest.mark.parametrize("late", [0, 1])
def test_the_stack_of_a_rank_that_holds_the_gil(stalling: Any, reports: Any, late: int) -> None:
    hvd = stalling()
    if hvd.rank() == late:
        hold_the_gil(LATE_S if late else LATE_COORDINATOR_S)
    hvd.barrier()
    report = one_with("in hold_the_gil", reports(hvd))
    assert f"barrier number 1: rank {late} is missing" in report and "test_stall.py" in report


@pytest.mark.ranks(3)
def test_a_missing_optimizer_step(stalling: Any, reports: Any) -> None:
    hvd = stalling()
    step = make_step(hvd)
    for _ in range(3):
        step()
    if hvd.rank() == 1:
        dawdle()
    step()
    report = one_with("in dawdle", reports(hvd))
    assert "gradients of a DistributedOptimizer" in report and "rank 1 is missing, ranks 0, 2 wait" in report
    assert "exchanges that the others have, in its step 3" in report and "optimizer step 3" in report


@pytest.mark.ranks(2)
def test_what_was_given_up_raises_on_the_late_rank_too_and_the_library_goes_on(stalling: Any) -> None:
    hvd = stalling(STALL_WARN_S=0, STALL_ABORT_S=2)
    if hvd.rank() == 1:
        time.sleep(5.5)
    for name in ("x", None):
        with pytest.raises(hvd.StallError, match="rank 1 is missing"):
            hvd.allreduce(torch.ones(1), name=name)
    if hvd.rank() == 0:
        time.sleep(1.5)
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum, name="x").item() == 2
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == 2


@pytest.mark.ranks(3)
def test_one_name_in_two_process_sets(stalling: Any, reports: Any) -> None:
    """Legal, and a mistake: each set waits for the member that went to the other one."""
    hvd = stalling()
    even, first = hvd.add_process_set([0, 2]), hvd.add_process_set([0, 1])
    if hvd.rank() == 0:
        dawdle()
        hvd.allreduce(torch.ones(1), name="x", process_set=first)
    hvd.allreduce(torch.ones(1), name="x", process_set=first if hvd.rank() == 1 else even)
    found = reports(hvd)
    for ranks, waiting in (("0, 2", 2), ("0-1", 1)):
        said = f"for allreduce 'x' in the process set of ranks {ranks}: rank 0 is missing, rank {waiting} waits"
        assert one_with(said, found)


@pytest.mark.ranks(2, 3)
def test_nothing_is_said_of_those_who_have_joined(stalling: Any, reports: Any) -> None:
    """A rank that has joined waits as long as the others have data; that is no stall."""
    hvd = stalling(STALL_WARN_S=2)
    for _ in range(40 if hvd.rank() == 1 else 4):
        hvd.allreduce(torch.ones(1), name="x")
        time.sleep(0.1)
    assert hvd.join() == 1
    assert [report for report in reports(hvd) if "'before'" not in report] == []


@pytest.mark.ranks(2)
def test_never(stalling: Any, reports: Any) -> None:
    hvd = stalling(STALL_WARN_S=0)
    if hvd.rank() == 1:
        time.sleep(2)
    hvd.barrier()
    assert reports(hvd) == []


BEGIN = """
import time
import torch
import mpiddp as hvd

hvd.init()
rank = hvd.rank()
hvd.allreduce(torch.ones(1), name="before")
"""


@pytest.mark.slow
def test_submitted_but_not_pushed(mpirun: Any) -> None:
    """Only the main thread may push at this thread level, and it has other things to do."""
    script = f"import mpi4py\nmpi4py.rc.thread_level = 'funneled'\n{BEGIN}" + (
        "hvd.barrier()\n"
        "handle = hvd.allreduce_async(torch.ones(100_000), name='x')\n"
        "if rank == 1:\n    time.sleep(4)\n"
        "hvd.synchronize(handle)\n"
    )
    done = mpirun(script, 2, env={"MPIDDP_STALL_WARN_S": "1"})
    report = done.stderr[done.stderr.index("'x'") :]
    assert "rank 1 is missing" in report
    assert "takes part but has not pushed for" in report or "has submitted 'x' and has not pushed since" in report
    assert "in <module>" in report


@pytest.mark.slow
@pytest.mark.parametrize("what", ["negotiated", "coordinator", "optimizer"])
def test_giving_up_ends_the_job(mpirun: Any, what: str) -> None:
    late = 0 if what == "coordinator" else 1
    script = f"{BEGIN}\nlate = {late}\nwhat = {what!r}\n" + (
        "model = torch.nn.Linear(4, 4)\n"
        "optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))\n"
        "for i in range(2):\n"
        "    if i == 1 and rank == late:\n        print('late', flush=True)\n        time.sleep(300)\n"
        "    if what == 'optimizer':\n        model(torch.ones(1, 4)).sum().backward()\n"
        "    else:\n        hvd.allreduce(torch.ones(1), name='x')\n"
    )
    done = mpirun(script, 2, env={"MPIDDP_STALL_WARN_S": "0", "MPIDDP_STALL_ABORT_S": "2"}, expect="failure")
    assert "StallError: waited" in done.stderr and f"rank {late} is missing" in done.stderr
    assert f"uncaught exception on rank {1 - late} of 2" in done.stderr
