"""A rank that ends or shuts down while others wait for it, or before they do: they learn who has left, and when."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.slow

#: The one who leaves is rank ``gone``; the others run ``wait()`` and must get the error within 5 s of its leaving.
BEGIN = """
import os, time
import torch
import mpiddp as hvd

hvd.init()
rank, size = hvd.rank(), hvd.size()

def left(wait):
    begun = time.monotonic()
    try:
        wait()
    except hvd.RankLeftError as error:
        assert f"rank {gone} left after" in str(error) and "join()" in str(error), error
        assert time.monotonic() - begun < 5, "too late"
        print(f"rank {rank} has learnt it\\n", end="")
    else:
        raise AssertionError("no error")
"""

MODEL = """
model = torch.nn.Linear(4, 4)
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1){more})
def step():
    optimizer.zero_grad()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
"""


def learnt(done: Any) -> list[int]:
    return sorted(int(line.split()[1]) for line in done.stdout.splitlines() if line.endswith("has learnt it"))


WAITS = {
    "allreduce": "hvd.allreduce(torch.ones(1), name='x')",
    "large": "hvd.allreduce(torch.ones(1_000_000), name='x')",
    "group": "hvd.grouped_allreduce([torch.ones(2), torch.ones(3)], name='x')",
    "allgather": "hvd.allgather(torch.ones(rank + 1, 2))",
    "barrier": "hvd.barrier()",
    "join": "hvd.join()",
    "add_process_set": "hvd.add_process_set([0])",
}


@pytest.mark.parametrize(("what", "gone"), [(what, index % 2) for index, what in enumerate(WAITS)])
def test_the_others_wait_already(mpirun: Any, what: str, gone: int) -> None:
    script = f"gone = {gone}\n{BEGIN}" + (
        "for _ in range(3):\n    hvd.allreduce(torch.ones(1))\n"
        f"if rank == gone:\n    time.sleep(1)\nelse:\n    left(lambda: {WAITS[what]})\n"
    )
    done = mpirun(script, 3, timeout_s=30)
    assert learnt(done) == [rank for rank in range(3) if rank != gone] and done.seconds < 20


@pytest.mark.parametrize(("how", "gone"), [("shutdown", 0), ("exit", 2)])
def test_the_others_come_later(mpirun: Any, how: str, gone: int) -> None:
    """Also long after the one who left has stopped to wait for them."""
    script = f"gone = {gone}\n{BEGIN}" + (
        "hvd.allreduce(torch.ones(1))\n"
        f"if rank == gone:\n    {'hvd.shutdown()' if how == 'shutdown' else 'pass'}\n"
        "else:\n"
        "    time.sleep(2.5)\n"
        f"    for _ in range(2):\n        left(lambda: {WAITS['allreduce']})\n"
        f"    left(lambda: {WAITS['barrier']})\n"
    )
    for env in ({}, {"MPIDDP_EXIT_TIMEOUT_S": "1"}):
        done = mpirun(script, 3, env=env, timeout_s=30)
        assert learnt(done) == sorted(3 * [rank for rank in range(3) if rank != gone])


@pytest.mark.parametrize(("when", "gone"), [("before", 0), ("after", 1)])
def test_in_backward(mpirun: Any, gone: int, when: str) -> None:
    dawdle = "time.sleep(1)" if (when == "after") else "pass"
    wait = "pass" if when == "after" else "time.sleep(1)"
    script = f"gone = {gone}\n{BEGIN}{MODEL.format(more='')}" + (
        "for _ in range(3):\n    step()\n"
        f"if rank == gone:\n    {dawdle}\nelse:\n    {wait}\n    left(step)\n    left(step)\n"
    )
    done = mpirun(script, 3, timeout_s=30)
    assert learnt(done) == sorted(2 * [rank for rank in range(3) if rank != gone])


def test_the_steps_are_the_optimizers(mpirun: Any) -> None:
    script = f"gone = 1\n{BEGIN}{MODEL.format(more='')}" + (
        "for _ in range(7):\n    step()\n"
        "if rank == 0:\n"
        "    try:\n        hvd.allreduce(torch.ones(1), name='loss')\n"
        "    except hvd.RankLeftError as error:\n"
        "        assert \"'loss'\" in str(error) and 'rank 1 left after 7 steps' in str(error), error\n"
        "    else:\n        raise AssertionError\n"
    )
    mpirun(script, 2, timeout_s=30)


@pytest.mark.parametrize("gone", [1])
def test_in_a_process_set(mpirun: Any, gone: int) -> None:
    """Rank 0, which is no member, computes on and hears of nothing."""
    script = f"gone = {gone}\n{BEGIN}" + (
        "pair = hvd.add_process_set([1, 2])\n"
        "if rank == 0:\n    time.sleep(6)\n"
        "elif rank != gone:\n"
        "    time.sleep(0.5)\n"
        "    left(lambda: hvd.allreduce(torch.ones(1), name='x', process_set=pair))\n"
        "    left(lambda: hvd.barrier(process_set=pair))\n"
    )
    assert learnt(mpirun(script, 3, timeout_s=30)) == 2 * [3 - gone]


@pytest.mark.parametrize("gone", [2])
def test_an_optimizer_of_a_process_set(mpirun: Any, gone: int) -> None:
    more = ", process_set=pair"
    script = f"gone = {gone}\n{BEGIN}pair = hvd.add_process_set([1, 2])\n" + (
        "if rank == 0:\n    time.sleep(6)\nelse:\n    "
        + MODEL.format(more=more).strip().replace("\n", "\n    ")
        + "\n    step()\n    if rank != gone:\n        left(step)\n"
    )
    assert learnt(mpirun(script, 3, timeout_s=30)) == [3 - gone]


def test_what_was_submitted_before_still_runs_and_the_rest_fails_at_once(mpirun: Any) -> None:
    """The one who leaves has something in flight that nobody else will ever submit, and something that they will."""
    script = f"gone = 1\n{BEGIN}" + (
        "if rank == gone:\n"
        "    hvd.allreduce_async(torch.ones(1), name='never')\n"
        "    hvd.allreduce_async(torch.ones(100_000), name='still')\n"
        "else:\n"
        "    time.sleep(1)\n"
        "    assert hvd.allreduce(torch.ones(100_000), op=hvd.Average, name='still').sum().item() == 100_000\n"
        "    begun = time.monotonic()\n"
        f"    left(lambda: {WAITS['allreduce']})\n"
        "    assert time.monotonic() - begun < 2, time.monotonic() - begun\n"
    )
    assert learnt(mpirun(script, 3, timeout_s=30)) == [0, 2]


def test_only_those_who_need_the_one_who_left_get_an_error(mpirun: Any) -> None:
    script = f"gone = 2\n{BEGIN}" + (
        "pair = hvd.add_process_set([0, 1])\n"
        "if rank != 2:\n"
        f"    left(lambda: {WAITS['allreduce']})\n"
        "    for _ in range(10):\n"
        "        assert hvd.allreduce(torch.ones(1), op=hvd.Sum, process_set=pair).item() == 2\n"
    )
    assert learnt(mpirun(script, 3, timeout_s=30)) == [0, 1]


def test_those_who_have_joined_learn_it(mpirun: Any) -> None:
    """One has joined, one leaves without joining, one still trains."""
    script = f"gone = 1\n{BEGIN}" + (
        "if rank == 0:\n    left(hvd.join)\n"
        f"elif rank == 2:\n    time.sleep(1)\n    left(lambda: {WAITS['allreduce']})\n"
    )
    assert learnt(mpirun(script, 3, timeout_s=30)) == [0, 2]


@pytest.mark.parametrize("first", [0, 1])
def test_uneven_ends_are_no_error(mpirun: Any, first: int) -> None:
    script = BEGIN + f"hvd.allreduce(torch.ones(1))\nif rank != {first}:\n    time.sleep(2)\n"
    for size in (2, 3):
        done = mpirun(script, size, env={"MPIDDP_EXIT_TIMEOUT_S": "1"}, timeout_s=30)
        assert "Error" not in done.stderr and "WARNING" not in done.stderr


def test_an_end_together_takes_no_time(mpirun: Any) -> None:
    script = BEGIN + (
        "pair = hvd.add_process_set([0, 1])\n"
        "hvd.barrier()\n"
        "begun = time.monotonic()\n"
        "hvd.shutdown()\n"
        "assert time.monotonic() - begun < 1, time.monotonic() - begun\n"
        "hvd.init()\n"
        "assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == size\n"
    )
    mpirun(script, 3, timeout_s=30)


def test_a_rank_that_has_joined_without_the_others_optimizer_is_told(mpirun: Any) -> None:
    script = (
        "import torch\nimport mpiddp as hvd\nhvd.init()\n"
        "if hvd.rank() == 1:\n    hvd.join()\n"
        "layer = torch.nn.Linear(2, 1)\n"
        "optimizer = hvd.DistributedOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1))\n"
        "layer(torch.ones(1, 2)).sum().backward()\n"
        "optimizer.step()\n"
    )
    done = mpirun(script, 2, timeout_s=30, expect="failure")
    assert "others train with DistributedOptimizer number 1, while it has made 0" in done.stderr
