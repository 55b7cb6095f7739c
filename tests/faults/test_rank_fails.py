"""One rank fails in one of the many ways that there are: the job ends in time, non-zero, and says which rank it was."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

#: From the failure to the end of mpirun, in seconds. Open MPI 4 alone takes 1 s to stop the other ranks.
BOUND_S = 5.0

SCRIPT = """
import os, signal, sys, threading, time
import mpiddp

mpiddp.init()
print("rank", mpiddp.rank(), "has begun", flush=True)
mpiddp.barrier()

def fail():
    {fail}

if mpiddp.rank() == 1:
    print("failing at", time.time(), flush=True)
    fail()
{others}
"""
COMPUTES = "time.sleep(40)"
WAITS = "import torch; mpiddp.allreduce(torch.ones(3), name='never complete')"


def assert_ended_in_time(done: Any) -> None:
    # The clock is the machine's, so that start-up does not count.
    at = re.search(r"failing at (\d+\.\d+)", done.stdout)
    assert at is not None, done.output
    assert time.time() - float(at[1]) < BOUND_S, done.output


@pytest.mark.parametrize("others", [COMPUTES, WAITS], ids=["others compute", "others wait"])
def test_uncaught_exception(mpirun: Any, others: str) -> None:
    script = SCRIPT.format(fail="raise ValueError('bad sample 17')", others=others)
    done = mpirun(script, 3, expect="failure")
    assert_ended_in_time(done)
    assert "uncaught exception on rank 1 of 3 on host " in done.output
    assert "ValueError: bad sample 17" in done.output and "in fail" in done.output
    assert "rank 0 of 3" not in done.output and "rank 2 of 3" not in done.output, "the others have nothing to say"


def test_uncaught_exception_beside_torch_distributed(mpirun: Any) -> None:
    """Its init_process_group() puts a hook over ours that holds back what ours writes."""
    begin = "import torch.distributed as d; d.init_process_group('gloo', store=d.HashStore(), rank=0, world_size=1)"
    done = mpirun(
        SCRIPT.format(fail=f"{begin}; raise ValueError('bad sample 18')", others=COMPUTES), 2, expect="failure"
    )
    assert "uncaught exception on rank 1 of 2 on host " in done.output
    assert "ValueError: bad sample 18" in done.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fail", "code", "words"),
    [
        ("sys.exit(3)", 3, "exits with code 3"),
        ("raise SystemExit('no data in ./data')", 1, "exits with code 1: no data in ./data"),
        ("import argparse; argparse.ArgumentParser().parse_args(['--what'])", 2, "exits with code 2"),
        ("threading.Thread(target=lambda: 1 / 0, name='mpiddp-x').start(); time.sleep(40)", 1, "ZeroDivisionError"),
        ("raise KeyboardInterrupt", 130, "was interrupted"),
    ],
)
def test_other_ends(mpirun: Any, fail: str, code: int, words: str) -> None:
    done = mpirun(SCRIPT.format(fail=fail, others=COMPUTES), 3, expect=code)
    assert_ended_in_time(done)
    assert words in done.output and "rank 1 of 3 on host " in done.output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_one_rank_is_killed_from_outside(mpirun: Any, number: signal.Signals) -> None:
    fail = f"os.kill(os.getpid(), signal.{number.name}); time.sleep(40)"
    done = mpirun(SCRIPT.format(fail=fail, others=COMPUTES), 3, expect="failure")
    assert_ended_in_time(done)
    if number == signal.SIGTERM:
        assert done.rc == 143, done


@pytest.mark.slow
def test_what_is_caught_ends_nothing(mpirun: Any) -> None:
    script = """
        import sys
        import mpiddp

        mpiddp.init()
        if mpiddp.rank() == 1:
            try:
                sys.exit(3)
            except SystemExit:
                print("caught")
        mpiddp.barrier()
        sys.exit(0 if mpiddp.rank() else None)
    """
    done = mpirun(script, 3)
    assert "caught" in done.stdout and "the job ends" not in done.output


def test_exceptions_on_all_ranks_at_once(mpirun: Any) -> None:
    done = mpirun("import mpiddp; mpiddp.init(); raise ValueError('everywhere')", 3, expect="failure")
    assert "ValueError: everywhere" in done.output and "of 3 on host" in done.output


@pytest.mark.slow
def test_a_world_of_one_ends_as_python_does(mpirun: Any) -> None:
    script = "import mpiddp; mpiddp.init(); raise ValueError('alone')"
    done = mpirun(script, 0, expect=1)
    assert "ValueError: alone" in done.stderr and "the job ends" not in done.output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_launcher_is_told_to_end(mpirun: Any, number: signal.Signals) -> None:
    script = """
        import time
        import mpiddp

        mpiddp.init()
        mpiddp.barrier()
        print("rank", mpiddp.rank(), "is ready", flush=True)
        while True:
            time.sleep(0.05)
            mpiddp.barrier()
    """
    job = mpirun.start(script, 3)
    assert wait_for(lambda: job.output().count("is ready") == 3), job.output()
    began = time.monotonic()
    os.kill(job.pid, number)
    done = job.wait(30)
    assert done.rc != 0 and not done.timed_out, done
    assert time.monotonic() - began < BOUND_S
    assert "Traceback" not in done.output


def wait_for(happened: Callable[[], bool], timeout_s: float = 120) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if happened():
            return True
        time.sleep(0.05)
    return False
