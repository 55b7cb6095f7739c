"""The timeline on real ranks: one file of all ranks, whoever calls, and whatever is not called."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

PHASES = ["negotiate", "queue", "pack", "exchange", "unpack"]
on_ranks = pytest.mark.ranks(1, 2, 3)


def work(world: Any) -> None:
    handles = [world.allreduce_async(torch.ones(1000), name=f"t{i}") for i in range(4)]
    for handle in reversed(handles):
        world.synchronize(handle)
    for _ in range(10):
        world.allreduce(torch.ones(3))
    model = torch.nn.Linear(10, 10)
    optimizer = world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, 10)).sum().backward()
        optimizer.step()


def read(path: Path) -> dict[int, dict[str, list[dict[str, Any]]]]:
    """The events of each rank's rows, in the order of time."""
    events = json.loads(path.read_text())["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found: dict[int, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for event in sorted((e for e in events if "ts" in e), key=lambda e: e["ts"]):
        found[event["pid"]][names[event["pid"], event["tid"]]].append(event)
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert all(name.startswith(f"rank {rank} on ") for rank, name in processes.items())
    assert processes.keys() == found.keys()
    return found


def check(path: Path, size: int) -> None:
    """Every tensor of every rank has its phases, in order and one after the other; rank 0 has each rank's tick."""
    found = read(path)
    assert sorted(found) == list(range(size))
    for rank, rows in found.items():
        for i in range(4):
            phases = [event for event in rows[f"t{i}"] if event["ph"] == "X"]
            # Which of them are fused is up to the moment.
            assert [e["name"] for e in phases] in (PHASES, ["negotiate", "queue", "exchange"])
            for before, after in itertools.pairwise(phases):
                assert before["ts"] + before["dur"] <= after["ts"] + 1e-3
            ticks = sorted(event["name"] for event in rows[f"t{i}"] if event["ph"] == "i")
            assert ticks == ([f"rank {r} ready" for r in range(size)] if rank == 0 else [])
        unnamed = [event for event in rows["allreduce.unnamed"] if event["ph"] == "X"]
        assert sum(event["name"] == "negotiate" for event in unnamed) == 10
        buckets = [e["name"] for name in rows if name.endswith(": bucket 0") for e in rows[name]]
        assert buckets == 2 * ["queue", "exchange"]
        assert [e["name"] for e in rows["drain"]] == ["drain", "drain"]


@on_ranks
def test_all_ranks_call(world: Any, shared_path: Path) -> None:
    from mpiddp.recording import start_timeline, stop_timeline

    for name in ("first.json", "second.json"):
        world.barrier()
        start_timeline(shared_path / name)
        with pytest.raises(ValueError, match=r"first\.json|second\.json"):
            start_timeline(shared_path / "other.json")
        work(world)
        stop_timeline()
        stop_timeline()
        world.barrier()
        check(shared_path / name, world.size())


@on_ranks
def test_rank_0_alone_calls(world: Any, shared_path: Path) -> None:
    from mpiddp.recording import start_timeline, stop_timeline

    path = shared_path / "trace.json"
    if world.rank() == 0:
        start_timeline(path, mark_cycles=True)
    world.barrier()
    work(world)
    if world.rank() == 0:
        stop_timeline()
    world.barrier()
    check(path, world.size())
    assert any(event["name"] == "cycle" for event in read(path)[0]["negotiation"])


@pytest.mark.ranks(3)
def test_a_part_larger_than_a_piece_and_several_sets(world: Any, shared_path: Path) -> None:
    from mpiddp.recording import start_timeline, stop_timeline

    pair = world.add_process_set([0, 1])
    world.barrier()
    start_timeline(shared_path / "trace.json")
    for i in range(600):
        world.allreduce(torch.ones(1), name=f"x{i}")
        if world.rank() < 2:
            world.allreduce(torch.ones(1), name=f"x{i}", process_set=pair)
    stop_timeline()
    world.barrier()
    world.remove_process_set(pair)
    for rank, rows in read(shared_path / "trace.json").items():
        expected = {f"x{i}" for i in range(600)}
        if rank < 2:
            expected |= {f"x{i} (ranks 0, 1)" for i in range(600)}
        assert {name for name in rows if name.startswith("x")} == expected
        assert all([e["name"] for e in rows[name]].count("negotiate") == 1 for name in expected)


@pytest.mark.ranks(2)
def test_the_profiler_shows_the_spans(world: Any) -> None:
    world.barrier()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for i in range(20):
            world.allreduce(torch.ones(100_000), name=f"x{i}")
    names = {event.key for event in profile.key_averages()}
    assert any(name.startswith("mpiddp::exchange x") for name in names)


@pytest.mark.slow
def test_an_unfinished_timeline_is_written_at_the_end(mpirun: Any, tmp_path: Path) -> None:
    script = (
        "import torch\nimport mpiddp as hvd\nhvd.init()\n"
        "if hvd.rank() == 1:\n    hvd.allreduce_async(torch.ones(3), name='never')\n"
        "for i in range(4):\n    hvd.allreduce(torch.ones(3), name=f't{i}')\n"
    )
    for variable, size in (("MPIDDP_TIMELINE", 3), ("HOROVOD_TIMELINE", 1)):
        path = tmp_path / f"{variable}.json"
        mpirun(script, size, env={variable: str(path), "MPIDDP_EXIT_TIMEOUT_S": "1"})
        found = read(path)
        assert sorted(found) == list(range(size))
        assert all(set(rows) >= {f"t{i}" for i in range(4)} for rows in found.values())
        if size == 3:
            assert found[1]["never"][0]["args"] == {"unfinished": True}


@pytest.mark.slow
def test_nobody_waits_for_ranks_that_do_not_come(mpirun: Any, tmp_path: Path) -> None:
    """Rank 0 is deaf while rank 1 ends: rank 1's part is in a file of its own."""
    script = (
        "import ctypes, time\nimport torch\nimport mpiddp as hvd\n"
        "from mpiddp.recording import start_timeline, stop_timeline\n"
        "hvd.init()\n"
        f"start_timeline({str(tmp_path / 'trace.json')!r})\n"
        "hvd.allreduce(torch.ones(3), name='x')\n"
        "if hvd.rank() == 0:\n    ctypes.PyDLL(None).sleep(6)\n    stop_timeline()\n"
    )
    done = mpirun(script, 2, env={"MPIDDP_EXIT_TIMEOUT_S": "1"})
    assert sorted(read(tmp_path / "trace.json")) == [0] and "lacks rank 1" in done.stderr
    assert sorted(read(tmp_path / "trace.json.rank1")) == [1] and "it is in" in done.stderr


def test_a_file_that_cannot_be_written(mpirun: Any, tmp_path: Path) -> None:
    script = "import mpiddp as hvd\nhvd.init()\n"
    done = mpirun(script, 2, env={"MPIDDP_TIMELINE": str(tmp_path / "missing" / "x.json")}, expect="failure")
    assert "FileNotFoundError" in done.stderr
