"""A rank that does not come: the others say who it is and what it does, and give up where they were told to."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.slow

SETTINGS = {"MPIDDP_STALL_WARN_S": "1"}

BEGIN = """
import ctypes, sys, time
import torch
import mpiddp as hvd

def hold_the_gil(seconds):
    sleep = ctypes.PyDLL(None).usleep
    end = time.monotonic() + seconds
    while time.monotonic() < end:  # a signal ends the sleep early
        sleep(int(1e6 * max(0.0, end - time.monotonic())))

hvd.init()
hvd.allreduce(torch.ones(1), name="before")
rank, size = hvd.rank(), hvd.size()
"""


def reports(done: Any) -> list[str]:
    """The reports, each with the lines that belong to it."""
    parts: list[str] = []
    for line in done.stderr.splitlines():
        if "WARNING waited" in line or "ERROR waited" in line:
            parts.append(line)
        elif parts and line.startswith("  "):
            parts[-1] += "\n" + line
    return parts


def report_with(words: str, done: Any) -> str:
    """The report that has these words: on a crowded machine whatever comes before may have waited for long, too."""
    found = reports(done)
    assert any(words in each for each in found), f"no report has {words!r}: {found}\n{done.stderr}"
    return next(each for each in found if words in each)


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_never_submits(mpirun: Any, late: int) -> None:
    script = f"{BEGIN}\nlate = {late}\n" + (
        "def dawdle():\n    time.sleep(4)\nif rank == late:\n    dawdle()\nhvd.allreduce(torch.ones(1), name='x')\n"
    )
    report = report_with("in dawdle", mpirun(script, 3, env=SETTINGS))
    others = "0, 2" if late else "1-2"
    assert f"for allreduce 'x': rank {late} is missing, ranks {others} wait" in report
    assert f"  rank {late} " in report and "computing, last push" in report and "the last 'before'" in report
    assert "has not submitted it" in report


@pytest.mark.parametrize("late", [0, 1])
def test_the_stack_of_a_rank_that_holds_the_gil(mpirun: Any, late: int) -> None:
    seconds = 4 if late else 7  # that the coordinator is silent is noticed later than who is missing there
    script = f"{BEGIN}\nif rank == {late}:\n    hold_the_gil({seconds})\nhvd.barrier()"
    report = report_with("in hold_the_gil", mpirun(script, 2, env=SETTINGS))
    assert f"barrier number 1: rank {late} is missing" in report and "script.py" in report


def test_submitted_but_not_pushed(mpirun: Any) -> None:
    """Only the main thread may push at this thread level, and it has other things to do."""
    script = (
        "import mpi4py\nmpi4py.rc.thread_level = 'funneled'\n" + BEGIN + "\n"
        "hvd.barrier()\n"
        "handle = hvd.allreduce_async(torch.ones(100_000), name='x')\n"
        "if rank == 1:\n    time.sleep(4)\n"
        "hvd.synchronize(handle)\n"
    )
    report = report_with("'x'", mpirun(script, 2, env=SETTINGS))
    assert "rank 1 is missing" in report
    assert "takes part but has not pushed for" in report or "has submitted 'x' and has not pushed since" in report
    assert "in <module>" in report


def test_a_missing_optimizer_step(mpirun: Any) -> None:
    script = BEGIN + (
        "model = torch.nn.Linear(4, 4)\n"
        "optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))\n"
        "def step():\n"
        "    optimizer.zero_grad()\n    model(torch.ones(1, 4)).sum().backward()\n    optimizer.step()\n"
        "for _ in range(3):\n    step()\n"
        "def evaluate():\n    time.sleep(4)\n"
        "if rank == 1:\n    evaluate()\n"
        "step()\n"
    )
    report = report_with("in evaluate", mpirun(script, 3, env=SETTINGS))
    assert "gradients of a DistributedOptimizer" in report and "rank 1 is missing, ranks 0, 2 wait" in report
    assert "exchanges that the others have, in its step 3" in report and "optimizer step 3" in report


@pytest.mark.parametrize("what", ["negotiated", "coordinator", "optimizer"])
def test_giving_up_ends_the_job(mpirun: Any, what: str) -> None:
    late = 0 if what == "coordinator" else 1
    script = f"{BEGIN}\nlate = {late}\nwhat = {what!r}\n" + (
        "model = torch.nn.Linear(4, 4)\n"
        "optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))\n"
        "for i in range(2):\n"
        "    if i == 1 and rank == late:\n        time.sleep(60)\n"
        "    if what == 'optimizer':\n        model(torch.ones(1, 4)).sum().backward()\n"
        "    else:\n        hvd.allreduce(torch.ones(1), name='x')\n"
    )
    done = mpirun(script, 2, env={"MPIDDP_STALL_WARN_S": "0", "MPIDDP_STALL_ABORT_S": "2"}, expect="failure")
    assert "StallError: waited" in done.stderr and f"rank {late} is missing" in done.stderr
    assert f"uncaught exception on rank {1 - late} of 2" in done.stderr
    assert done.seconds < 20


def test_what_was_given_up_raises_on_the_late_rank_too_and_the_library_goes_on(mpirun: Any) -> None:
    script = BEGIN + (
        "if rank == 1:\n    time.sleep(5.5)\n"
        "for name in ('x', None):\n"
        "    try:\n        hvd.allreduce(torch.ones(1), name=name)\n"
        "    except hvd.StallError as error:\n        assert 'rank 1 is missing' in str(error)\n"
        "    else:\n        raise SystemExit(3)\n"
        "if rank == 0:\n    time.sleep(1.5)\n"
        "assert hvd.allreduce(torch.ones(1), op=hvd.Sum, name='x').item() == size\n"
        "assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == size\n"
    )
    mpirun(script, 2, env={"MPIDDP_STALL_WARN_S": "0", "MPIDDP_STALL_ABORT_S": "2"})


def test_one_name_in_two_process_sets(mpirun: Any) -> None:
    """Legal, and a mistake: each set waits for the member that went to the other one."""
    script = BEGIN + (
        "even, first = hvd.add_process_set([0, 2]), hvd.add_process_set([0, 1])\n"
        "process_set = even if rank in (0, 2) else first\n"
        "if rank == 0:\n    time.sleep(4)\n    hvd.allreduce(torch.ones(1), name='x', process_set=first)\n"
        "hvd.allreduce(torch.ones(1), name='x', process_set=process_set)\n"
    )
    done = mpirun(script, 3, env=SETTINGS)
    for ranks, waiting in (("0, 2", 2), ("0-1", 1)):
        said = f"for allreduce 'x' in the process set of ranks {ranks}: rank 0 is missing, rank {waiting} waits"
        assert report_with(said, done)


def test_nothing_is_said_of_those_who_have_joined(mpirun: Any) -> None:
    """A rank that has joined waits as long as the others have data; that is no stall."""
    script = BEGIN + (
        "for i in range(40 if rank == 1 else 4):\n    hvd.allreduce(torch.ones(1), name='x')\n    time.sleep(0.1)\n"
        "assert hvd.join() == 1\n"
    )
    for size in (2, 3):
        done = mpirun(script, size, env={"MPIDDP_STALL_WARN_S": "2"})
        assert [report for report in reports(done) if "'before'" not in report] == []


def test_never(mpirun: Any) -> None:
    script = f"{BEGIN}\nif rank == 1:\n    time.sleep(2)\nhvd.barrier()"
    assert reports(mpirun(script, 2, env={"MPIDDP_STALL_WARN_S": "0"})) == []
