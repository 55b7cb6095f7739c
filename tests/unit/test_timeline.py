"""The timeline's parts: what is recorded, how it becomes a Chrome trace, the clock; spans to which nobody listens."""

from __future__ import annotations

import json
import random
import threading
from collections import defaultdict
from typing import Any

import pytest
import torch

from mpiddp import trace
from mpiddp.engine import Handle
from mpiddp.timeline import recorder
from mpiddp.timeline.chrome import Chrome
from mpiddp.timeline.clock import Clock
from mpiddp.timeline.nvtx import NvtxRanges
from mpiddp.timeline.recorder import Record, Recorder, Tensor

WORLD = (0, 1)
PHASES = ("negotiate", "queue", "pack", "exchange", "unpack")


def tensor(name: str, lane: int = -1, ranks: tuple[int, ...] = WORLD, error: str = "") -> Tensor:
    return Tensor((ranks, lane), name, error)


def chrome(records: list[Record], now_ns: int = 10**9, **options: Any) -> list[dict[str, Any]]:
    made = Chrome(0, 2, "host", **options)
    return json.loads("[" + ",".join(made.lines(records, now_ns)) + "]")


def rows(events: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The events of each row, by its name and in the order of time."""
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in sorted((e for e in events if "ts" in e), key=lambda e: (e["ts"], e["ph"] == "i")):
        found[names[event["tid"]]].append(event)
    return found


def life(name: str, at: int, number: int, error: str = "") -> list[Record]:
    """The records of a tensor that is fused with another one, begun at ``at``."""
    both = (tensor(name), tensor(f"{name}, too"))
    return [
        *(Record("i", "submitted", at, 0, (one,)) for one in both),
        Record("i", "ready", at + 10, 0, both),
        Record("B", "pack", at + 20, number, both),
        Record("E", "pack", at + 25, number, both),
        Record("B", "exchange", at + 30, number + 1, both),
        Record("E", "exchange", at + 45, number + 1, both),
        Record("B", "unpack", at + 45, number + 2, both),
        Record("E", "unpack", at + 50, number + 2, both),
        Record("i", "done", at + 50, 0, tuple(one._replace(error=error) for one in both)),
    ]


def test_a_tensor_passes_its_phases_in_order() -> None:
    found = rows(chrome(life("a", 1000, 1), shift_ns=500))
    assert set(found) == {"a", "a, too"}
    for events in found.values():
        assert [event["name"] for event in events] == list(PHASES)
        assert [(event["ts"], event["dur"]) for event in events] == [
            (1.5, 0.01), (1.51, 0.01), (1.52, 0.005), (1.53, 0.015), (1.545, 0.005),
        ]  # fmt: skip
        assert all(event["ph"] == "X" and event["pid"] == 0 for event in events)


@pytest.mark.parametrize("seed", range(20))
def test_overlapping_tensors_do_not_corrupt_each_other(seed: int) -> None:
    draw = random.Random(seed)
    records: list[Record] = []
    for index in range(10):
        for again in range(3):
            records += life(f"t{index}", again * 1000 + draw.randrange(900), 100 * index + 10 * again + 1)
    records.sort(key=lambda record: (record.at_ns, record.name != "submitted"))
    found = rows(chrome(records))
    assert len(found) == 20
    for events in found.values():
        assert [event["name"] for event in events] == 3 * list(PHASES)
        ends = [round(1000 * (event["ts"] + event["dur"])) for event in events]
        begins = [round(1000 * event["ts"]) for event in events]
        assert all(end <= begin for end, begin in zip(ends, begins[1:], strict=False))


def test_operations_without_a_name_share_as_many_rows_as_are_in_flight() -> None:
    records = []
    for number in range(1, 100):
        submitted = 100 * number
        both = [tensor(f"allreduce.unnamed.{number}"), tensor(f"allreduce.unnamed.{number + 1}")]
        records.append(Record("i", "submitted", submitted, 0, (both[0],)))
        for rank in (1, 0):  # rank 1 is ready before rank 0 has even submitted it
            records.append(Record("i", "rank ready", submitted + 50 + rank, 0, (both[1 - rank],), rank))
        if number > 2:
            records.append(Record("i", "done", submitted + 60, 0, (tensor(f"allreduce.unnamed.{number - 2}"),)))
    found = rows(chrome(records))
    assert 2 <= len(found) <= 4 and all(name.startswith("allreduce.unnamed") for name in found)
    slices = [event for events in found.values() for event in events if event["ph"] == "X"]
    assert len(slices) == 99 and sum(event["args"] == {"unfinished": True} for event in slices if "args" in event) == 2


def test_each_rank_that_becomes_ready_is_a_tick() -> None:
    a = tensor("a")
    records = [
        Record("i", "rank ready", 5, 0, (a,), 1),
        Record("i", "submitted", 10, 0, (a,)),
        Record("i", "rank ready", 12, 0, (a,), 0),
        Record("i", "ready", 13, 0, (a,)),
    ]
    ticks = [event for event in rows(chrome(records))["a"] if event["ph"] == "i"]
    assert [(tick["name"], tick["ts"], tick["s"]) for tick in ticks] == [
        ("rank 1 ready", 0.005, "t"), ("rank 0 ready", 0.012, "t"),
    ]  # fmt: skip


def test_lanes_process_sets_errors_and_what_has_not_ended() -> None:
    bucket, other = tensor("bucket 0", lane=0), tensor("a", ranks=(0, 2))
    records = [
        Record("i", "submitted", 0, 0, (bucket,)),
        Record("i", "submitted", 0, 0, (other,)),
        Record("i", "done", 5, 0, (other._replace(error="MismatchError"),)),
        Record("B", "exchange", 20, 1, (bucket,)),
        Record("B", "drain", 30, 2, ()),
    ]
    found = rows(chrome(records, now_ns=50))
    assert [e["name"] for e in found["optimizer 0: bucket 0"]] == ["queue", "exchange"]
    assert found["optimizer 0: bucket 0"][1]["args"] == {"unfinished": True}
    assert [e["name"] for e in found["a (ranks 0, 2)"]] == ["negotiate", "failed: MismatchError"]
    assert found["drain"][0]["dur"] == 0.02


def test_rounds_are_marked_where_that_is_asked_for() -> None:
    records = [Record("i", "cycle", 5, 0, ())]
    assert not rows(chrome(records))
    assert [event["name"] for event in rows(chrome(records, mark_cycles=True))["negotiation"]] == ["cycle"]


def test_names_are_quoted() -> None:
    name = 'a "b" \\ \n ü'
    assert set(rows(chrome([Record("i", "submitted", 0, 0, (tensor(name),))]))) == {name}


# -- recording ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def listening() -> Any:
    sink = Recorder()
    trace.add_sink(sink)
    yield sink
    trace.remove_sink(sink)


def test_nothing_is_lost_when_the_memory_is_full(listening: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "_MOST_HELD", 64)

    def work(thread: int) -> None:
        for number in range(500):
            handle = Handle(f"{thread}: {number}", (WORLD, -1))
            trace.instant("submitted", name=handle.name, of=(handle,))

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(listening._held) < 64
    for _ in range(2):  # it can be read more than once
        names = [record.tensors[0].name for record in listening.replay()]
        assert sorted(names) == sorted(f"{thread}: {number}" for thread in range(3) for number in range(500))
        for thread in range(3):
            assert [n for n in names if n.startswith(f"{thread}:")] == [f"{thread}: {n}" for n in range(500)]


def test_a_span_may_end_in_another_thread_and_spans_need_not_be_nested(listening: Recorder) -> None:
    def exchange(name: str) -> Any:
        handle = Handle(name, (WORLD, -1))
        with trace.span("exchange", name=name, of=(handle,)):
            yield

    a, b = exchange("a"), exchange("b")
    next(a)
    next(b)
    for generator in (a, b):
        thread = threading.Thread(target=lambda g=generator: next(g, None))
        thread.start()
        thread.join()
    found = rows(chrome(list(listening.replay())))
    assert [event["name"] for event in found["a"]] == [event["name"] for event in found["b"]] == ["exchange"]
    assert found["a"][0]["ts"] <= found["b"][0]["ts"] and "args" not in found["a"][0]


def test_a_handle_is_not_kept_alive(listening: Recorder) -> None:
    import weakref

    class Kept(Handle):
        pass

    handle = Kept("a", (WORLD, -1))
    handle.fail(ValueError("on purpose"))
    trace.instant("done", name="a", of=(handle,))
    gone = weakref.ref(handle)
    del handle
    assert gone() is None
    (record,) = listening.replay()
    assert record.tensors == (Tensor((WORLD, -1), "a", "ValueError"),)


def test_a_span_that_nobody_listens_to_is_no_object() -> None:
    assert trace.span("exchange", name="a") is trace.span("pack", name="b")
    assert not trace.active()


def test_spans_appear_in_the_profiler() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        outer, inner = trace.span("exchange", name="a"), trace.span("exchange", name="b")
        outer.__enter__()
        inner.__enter__()
        torch.ones(3).add_(1)
        outer.__exit__(None, None, None)  # not nested
        inner.__exit__(None, None, None)
        with trace.span("drain"):
            pass
    names = {event.key for event in profile.key_averages()}
    assert {"mpiddp::exchange a", "mpiddp::exchange b", "mpiddp::drain"} <= names


def test_spans_become_nvtx_ranges() -> None:
    class Nvtx:
        def __init__(self) -> None:
            self.ranges: list[str] = []
            self.open: set[int] = set()

        def range_start(self, name: str) -> int:
            self.ranges.append(name)
            self.open.add(len(self.ranges))
            return len(self.ranges)

        def range_end(self, number: int) -> None:
            self.open.remove(number)

    nvtx = Nvtx()
    sink = NvtxRanges(nvtx)
    trace.add_sink(sink)
    first, second = trace.span("exchange", name="a"), trace.span("drain")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    trace.instant("done", name="a")
    trace.remove_sink(sink)
    assert nvtx.ranges == ["mpiddp::exchange a", "mpiddp::drain"] and not nvtx.open


# -- the clock ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift_ns", [0, 7_000_000_000, -123_456_789])
def test_the_clock_is_known_within_its_error(shift_ns: int) -> None:
    draw = random.Random(shift_ns)
    clock, now = Clock(), 1_000_000
    while not clock.is_known:
        there, back = draw.randrange(2_000, 90_000), draw.randrange(2_000, 90_000)
        clock.answer(now, now + there + shift_ns, now + there + back)
        now += 1_000_000
    assert abs(clock.shift_ns - shift_ns) <= clock.error_ns < 60_000
    assert shift_ns or clock.shift_ns == 0
