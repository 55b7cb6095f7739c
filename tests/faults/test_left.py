"""A rank that ends or shuts down while others wait for it, or before they do: they learn who has left, and when."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

on_three_ranks = pytest.mark.ranks(3)

WAITS: dict[str, Callable[[Any], object]] = {
    "allreduce": lambda hvd: hvd.allreduce(torch.ones(1), name="x"),
    "large": lambda hvd: hvd.allreduce(torch.ones(1_000_000), name="x"),
    "group": lambda hvd: hvd.grouped_allreduce([torch.ones(2), torch.ones(3)], name="x"),
    "allgather": lambda hvd: hvd.allgather(torch.ones(hvd.rank() + 1, 2)),
    "barrier": lambda hvd: hvd.barrier(),
    "join": lambda hvd: hvd.join(),
    "add_process_set": lambda hvd: hvd.add_process_set([0]),
}


def left(gone: int, hvd: Any, wait: Callable[[Any], object] = WAITS["allreduce"], within_s: float = 5) -> None:
    """``wait`` raises in time that rank ``gone`` has left, also when that was before."""
    begun = time.monotonic()
    with pytest.raises(hvd.RankLeftError) as found:
        wait(hvd)
    assert f"rank {gone} left after" in str(found.value) and "join()" in str(found.value)
    assert time.monotonic() - begun < within_s


def make_step(hvd: Any, **more: Any) -> Callable[[Any], None]:
    model = torch.nn.Linear(4, 4)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **more)

    def step(_: Any) -> None:
        optimizer.zero_grad()
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()

    return step


@on_three_ranks
@pytest.mark.parametrize(("what", "gone"), [(what, index % 2) for index, what in enumerate(WAITS)])
def test_the_others_wait_already(begin: Any, what: str, gone: int) -> None:
    hvd = begin()
    for _ in range(3):
        hvd.allreduce(torch.ones(1))
    if hvd.rank() == gone:
        time.sleep(0.5)
    else:
        left(gone, hvd, WAITS[what])


@on_three_ranks
@pytest.mark.parametrize("exit_timeout_s", [60, 0.5])
@pytest.mark.parametrize("gone", [0, 2])
def test_the_others_come_later(begin: Any, gone: int, exit_timeout_s: float) -> None:
    """Also long after the one who left has stopped to wait for them."""
    hvd = begin(EXIT_TIMEOUT_S=exit_timeout_s)
    hvd.allreduce(torch.ones(1))
    if hvd.rank() == gone:
        hvd.shutdown()
    else:
        time.sleep(1.5)
        for _ in range(2):
            left(gone, hvd)
        left(gone, hvd, WAITS["barrier"])


@on_three_ranks
@pytest.mark.parametrize(("when", "gone"), [("before", 0), ("after", 1)])
def test_in_backward(begin: Any, gone: int, when: str) -> None:
    hvd = begin()
    step = make_step(hvd)
    for _ in range(3):
        step(hvd)
    if (hvd.rank() == gone) == (when == "after"):
        time.sleep(0.5)
    if hvd.rank() != gone:
        left(gone, hvd, step)
        left(gone, hvd, step)


@on_three_ranks
def test_the_steps_are_the_optimizers(begin: Any) -> None:
    hvd = begin()
    step = make_step(hvd)
    for _ in range(7):
        step(hvd)
    if hvd.rank() != 1:
        with pytest.raises(hvd.RankLeftError, match=r"'loss'(.|\n)*rank 1 left after 7 steps"):
            hvd.allreduce(torch.ones(1), name="loss")


@on_three_ranks
def test_in_a_process_set(begin: Any) -> None:
    """Rank 0, which is no member, computes on and hears of nothing."""
    hvd = begin()
    pair = hvd.add_process_set([1, 2])
    if hvd.rank() == 0:
        time.sleep(2)
    elif hvd.rank() == 2:
        time.sleep(0.3)
        left(1, hvd, lambda hvd: hvd.allreduce(torch.ones(1), name="x", process_set=pair), within_s=1.5)
        left(1, hvd, lambda hvd: hvd.barrier(process_set=pair), within_s=1.5)


@on_three_ranks
def test_an_optimizer_of_a_process_set(begin: Any) -> None:
    hvd = begin()
    pair = hvd.add_process_set([1, 2])
    if hvd.rank() == 0:
        time.sleep(2)
    else:
        step = make_step(hvd, process_set=pair)
        step(hvd)
        if hvd.rank() == 1:
            left(2, hvd, step, within_s=1.5)


@on_three_ranks
def test_what_was_submitted_before_still_runs_and_the_rest_fails_at_once(begin: Any) -> None:
    """The one who leaves has something in flight that nobody else will ever submit, and something that they will."""
    hvd = begin()
    if hvd.rank() == 1:
        hvd.allreduce_async(torch.ones(1), name="never")
        hvd.allreduce_async(torch.ones(100_000), name="still")
    else:
        time.sleep(0.5)
        assert hvd.allreduce(torch.ones(100_000), op=hvd.Average, name="still").sum().item() == 100_000
        left(1, hvd, within_s=2)


@on_three_ranks
def test_only_those_who_need_the_one_who_left_get_an_error(begin: Any) -> None:
    hvd = begin()
    pair = hvd.add_process_set([0, 1])
    if hvd.rank() != 2:
        left(2, hvd)
        for _ in range(10):
            assert hvd.allreduce(torch.ones(1), op=hvd.Sum, process_set=pair).item() == 2


@on_three_ranks
def test_those_who_have_joined_learn_it(begin: Any) -> None:
    """One has joined, one leaves without joining, one still trains."""
    hvd = begin()
    if hvd.rank() == 0:
        left(1, hvd, WAITS["join"])
    elif hvd.rank() == 2:
        time.sleep(0.5)
        left(1, hvd)


@on_three_ranks
def test_an_end_together_takes_no_time(begin: Any) -> None:
    hvd = begin()
    hvd.add_process_set([0, 1])
    hvd.barrier()
    begun = time.monotonic()
    hvd.shutdown()
    assert time.monotonic() - begun < 1
    hvd.init()
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum).item() == 3


ENDS = """
import time, torch
import mpiddp as hvd

hvd.init()
hvd.allreduce(torch.ones(1))
"""


def test_a_process_that_ends(mpirun: Any) -> None:
    script = ENDS + (
        "if hvd.rank() != 2:\n"
        "    time.sleep(2.5)\n"
        "    for _ in range(2):\n"
        "        try:\n            hvd.allreduce(torch.ones(1), name='x')\n"
        "        except hvd.RankLeftError as error:\n"
        "            assert 'rank 2 left after' in str(error), error\n            print('has learnt it\\n', end='')\n"
    )
    assert mpirun(script, 3, env={"MPIDDP_EXIT_TIMEOUT_S": "1"}).stdout.count("has learnt it") == 4


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 1])
def test_uneven_ends_are_no_error(mpirun: Any, first: int) -> None:
    script = f"{ENDS}if hvd.rank() != {first}:\n    time.sleep(2)\n"
    for size in (2, 3):
        done = mpirun(script, size, env={"MPIDDP_EXIT_TIMEOUT_S": "1"})
        assert "Error" not in done.stderr and "WARNING" not in done.stderr


@pytest.mark.slow
def test_a_rank_that_has_joined_without_the_others_optimizer_is_told(mpirun: Any) -> None:
    script = (
        "import torch\nimport mpiddp as hvd\nhvd.init()\n"
        "if hvd.rank() == 1:\n    hvd.join()\n"
        "layer = torch.nn.Linear(2, 1)\n"
        "optimizer = hvd.DistributedOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1))\n"
        "layer(torch.ones(1, 2)).sum().backward()\n"
        "optimizer.step()\n"
    )
    done = mpirun(script, 2, expect="failure")
    assert "others train with DistributedOptimizer number 1, while it has made 0" in done.stderr
