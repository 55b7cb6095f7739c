"""``mpiddp plan``: the formulas, by hand; its arguments; whom it measures with whom. And what backward hides."""

from __future__ import annotations

import argparse

import pytest

from mpiddp.cli.plan import arguments, model
from mpiddp.cli.plan.model import Figures, Wire
from mpiddp.cli.plan.predict import Work, described, row
from mpiddp.collectives import ring
from mpiddp.collectives.pairs import neighbours
from mpiddp.config import Config
from mpiddp.optimizer.network import Network, bucket_nbytes
from mpiddp.optimizer.watch import ExchangeReport, covered

KIB, MIB = 1 << 10, 1 << 20
NETWORK = Wire(short_s=1.0, long_s=2.0, byte_s=1.0 / KIB)  # a second a message, two a long one, a second a KiB
WITHIN = Wire(0.5, 0.5, 0.0)


def figures(local_size: int = 1, add_byte_s: float = 0.0) -> Figures:
    return Figures(local_size, NETWORK, WITHIN, 4.0, 1.0 / MIB, add_byte_s, 512 * KIB)


def test_a_message_is_short_or_long() -> None:
    assert NETWORK.message_s(64 * KIB) == 1 + 64
    assert NETWORK.message_s(128 * KIB) == 2 + 128


def test_the_ring() -> None:
    assert model.ring_s(1, MIB, NETWORK, 0.0, 512 * KIB) == 0
    # Chunks of one segment: 2(p-1) latencies, 2(p-1)/p of the bytes, half of which are added.
    assert model.ring_s(4, 128 * KIB, NETWORK, 0.0, 512 * KIB) == 6 * (1 + 32)
    assert model.ring_s(4, 128 * KIB, NETWORK, 1.0 / KIB, 512 * KIB) == 6 * (1 + 32) + 3 * 32
    # Chunks of several: the bytes, and one latency.
    assert model.ring_s(4, 512 * KIB, NETWORK, 0.0, 512 * KIB) == 6 * 128 + 1
    assert model.ring_s(4, 8 * MIB, NETWORK, 0.0, 512 * KIB) == 6 * 2048 + 2
    far = Wire(1.0, 2000.0, 1.0 / KIB)  # unless a segment's latency is longer than a chunk
    assert model.ring_s(4, 8 * MIB, far, 0.0, 512 * KIB) == 6 * (2000 + 512) + 2000


def test_short_chunks_go_in_pieces_that_need_no_answer() -> None:
    assert [ring.segments_of(kib * KIB, 512 * KIB) for kib in (0, 60, 61, 1024, 1025, 4096)] == [1, 1, 2, 18, 3, 8]
    assert ring.segments_of(MIB, 16 * KIB) == 64, "as the user says"


@pytest.mark.parametrize(("nodes", "steps"), [(2, 1), (4, 2), (8, 3), (3, 1 + 2), (6, 2 + 2)])
def test_doubling(nodes: int, steps: int) -> None:
    assert model.doubling_s(nodes, 4 * KIB, figures()) == steps * (1 + 4)


def test_doubling_has_cheap_steps_within_nodes() -> None:
    assert model.doubling_s(4, 4 * KIB, figures(local_size=2)) == 0.5 + 2 * (1 + 4)
    assert model.doubling_s(2, 4 * KIB, figures(local_size=4)) == 2 * 0.5 + 1 * (1 + 4)


@pytest.mark.parametrize(("nodes", "local"), [(2, 1), (3, 1), (4, 2)])
def test_the_latency_is_that_of_a_step_of_doubling(nodes: int, local: int) -> None:
    found = model.calibrated(nodes, 4 * KIB, 100.0, figures(local))
    assert model.doubling_s(nodes, 4 * KIB, found) == pytest.approx(100)
    assert found.network.byte_s == NETWORK.byte_s and found.within == WITHIN
    assert model.calibrated(nodes, 4 * KIB, 0.0, figures(local)).network.short_s == 0


def test_layers() -> None:
    one_part = 4.0 + 4.0 + model.ring_s(2, 2 * MIB, NETWORK, 0.0, 512 * KIB)
    assert model.hierarchical_s(2, 4 * MIB, figures(2)) == one_part
    part = model.ring_s(2, 4 * MIB, NETWORK, 0.0, 512 * KIB)
    assert model.hierarchical_s(2, 32 * MIB, figures(2)) == (4.0 + 8.0) + 4 * part


def test_the_algorithm_is_the_library_s() -> None:
    assert model.allreduce(4, 4 * KIB, figures())[0] == "doubling"
    assert model.allreduce(4, MIB, figures()) == ("ring", model.ring_s(4, MIB, NETWORK, 0.0, 512 * KIB))
    assert model.allreduce(4, MIB, figures(2))[0] == "hierarchical"
    assert model.allreduce(1, MIB, figures(2)) == ("shared_memory", 4.0 + 1.0)
    assert model.allreduce(1, MIB, figures()) == ("shared_memory", 0.0)
    # One ring through all ranks has a node's link for one of its streams.
    name, seconds = model.allreduce(4, 64 * MIB, figures(2), "ring")
    assert name == "ring" and seconds == pytest.approx(2 * 7 / 8 * 64 * KIB / 2 + 2)


def test_buckets_and_what_backward_hides() -> None:
    assert model.buckets(10, 1, 4) == [1, 4, 4, 1]
    assert model.buckets(3, 8, 4) == [3]
    assert model.exposed_s([4], [2.0], 10.0) == 2.0, "the only bucket is full when backward ends"
    assert model.exposed_s([1, 1], [2.0, 2.0], 10.0) == 2.0, "the first one is hidden"
    assert model.exposed_s([1, 1], [8.0, 8.0], 10.0) == 5 + 16 - 10


def test_a_row() -> None:
    config = Config(bucket_mb=1.0, first_bucket_mb=1.0)
    found = row(2, figures(), Work(2 * MIB, 3000.0), config)
    each = 2 * 512.0 + 1.0  # s: a ring of chunks of several segments
    assert (found["ranks"], found["algorithm"], found["buckets"]) == (2, "ring", 2)
    assert found["exchange_ms"] == 2 * each * 1e3
    assert found["exposed_ms"] == pytest.approx(each * 1e3 + max(0.0, each - 1000.0) * 1e3)
    assert found["efficiency"] == pytest.approx(3000 / (found["step_ms"] / 1e3), abs=1e-4)
    alone = row(1, figures(), Work(2 * MIB, None), config)
    assert (alone["algorithm"], alone["exchange_ms"], alone["step_ms"]) == (None, 0.0, None)


def test_buckets_suit_the_network_and_the_gradients() -> None:
    def mib(latency_s: float, byte_s: float, nodes: int, of_mib: int, local: int = 1) -> float:
        return round(bucket_nbytes(Network(latency_s, byte_s), nodes, local, of_mib * MIB) / MIB, 1)

    near = 1e-4, 8.5e-9
    assert [mib(*near, 2, of_mib) for of_mib in (1, 32, 1000, 100_000)] == [1.0, 1.0, 5.8, 25.0]
    assert mib(3e-3, 8.5e-9, 2, 250) == 13.1, "far: larger"
    assert mib(*near, 2, 1000, local=4) > mib(*near, 2, 1000), "a node's ranks share the bytes, not the latencies"
    assert mib(*near, 64, 1000) > mib(*near, 2, 1000), "many steps"
    assert mib(1e-4, 0.0, 2, 1000) == 25.0


def test_it_says_when_there_is_no_network() -> None:
    words = "\n".join(described(figures(2), 1, Work(MIB, None)))
    assert "no network" in words and "start ranks on two nodes" in words and "--step-ms" in words
    assert "between 2 nodes, 2 rank(s) of each at once" in described(figures(2), 2, Work(MIB, 0.1))[0]


def test_partners() -> None:
    two_by_two = [0, 0, 1, 1]
    assert [neighbours(two_by_two, rank, False) for rank in range(4)] == [(2, 2), (3, 3), (0, 0), (1, 1)]
    assert [neighbours(two_by_two, rank, True) for rank in range(4)] == [(1, 1), (0, 0), (3, 3), (2, 2)]
    assert [neighbours([0, 1, 2], rank, False) for rank in range(3)] == [(1, 2), (2, 0), (0, 1)]
    four = [0, 1, 2, 3]
    assert [[neighbours(four, rank, False, turn)[0] for rank in four] for turn in range(2)] == [
        [1, 0, 3, 2],
        [3, 2, 1, 0],
    ]
    assert neighbours([0, 1], 0, False, 1) == (1, 1)
    assert neighbours([0, 1], 0, True) == (None, None)


def test_numbers_as_people_write_them() -> None:
    assert [arguments.parse_count(text) for text in ("7", "25M", "1.3B", "64k", "4.1M")] == [
        7,
        25_000_000,
        1_300_000_000,
        64_000,
        4_100_000,
    ]
    assert arguments.parse_nodes("2,16") == [2, 16]
    for parse, text in (
        (arguments.parse_count, "many"),
        (arguments.parse_count, "0.5"),
        (arguments.parse_count, "nan"),
        (arguments.parse_count, "inf"),
        (arguments.parse_nodes, "2,0"),
        (arguments.parse_nodes, ""),
        (arguments.parse_positive, "-1"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is"):
            parse(text)


def test_time_under_way_counts_once() -> None:
    assert covered([], 9.0) == 0
    assert covered([(1.0, 1), (2.0, 1), (3.0, -1), (4.0, -1), (6.0, 1), (7.0, -1)], 9.0) == 3 + 1
    assert covered([(1.0, 1), (2.0, -1), (2.0, 1)], 5.0) == 4, "what has no end lasts until now"


def test_a_report_in_words() -> None:
    report = ExchangeReport()
    assert report.hidden is None and "no gradients" in str(report)
    report.steps, report.under_way_s, report.waited_s = 2, 0.02, 0.005
    assert report.hidden == 0.75
    assert str(report).startswith("75 % of the exchange hidden behind backward: buckets under way for 10.00 ms a step")
