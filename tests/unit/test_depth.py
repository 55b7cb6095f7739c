"""How large a staging buffer a rank takes: whichever has cost it less, and now and then the other."""

from __future__ import annotations

from mpiddp.transport.depth import DEEP_NBYTES, SHALLOW_NBYTES, Depth


def _played(depth: Depth, costs: dict[int, float], exchanges: int) -> list[int]:
    chosen = []
    for _ in range(exchanges):
        chosen.append(depth.choose())
        depth.note(chosen[-1], costs[chosen[-1]])
    return chosen


def test_both_are_tried_once_and_then_the_better_one_is_kept() -> None:
    chosen = _played(Depth(), {SHALLOW_NBYTES: 1.0, DEEP_NBYTES: 2.0}, 100)
    assert chosen[:3] == [SHALLOW_NBYTES, DEEP_NBYTES, SHALLOW_NBYTES] and set(chosen[2:]) == {SHALLOW_NBYTES}


def test_cores_that_come_to_share_no_cache_are_noticed_at_once() -> None:
    depth = Depth()
    _played(depth, {SHALLOW_NBYTES: 1.0, DEEP_NBYTES: 2.0}, 10)
    assert _played(depth, {SHALLOW_NBYTES: 3.0, DEEP_NBYTES: 2.0}, 3) == [SHALLOW_NBYTES, DEEP_NBYTES, DEEP_NBYTES]


def test_cores_that_come_to_share_one_again_are_noticed_soon() -> None:
    depth = Depth()
    _played(depth, {SHALLOW_NBYTES: 3.0, DEEP_NBYTES: 2.0}, 10)
    assert depth.best == DEEP_NBYTES
    chosen = _played(depth, {SHALLOW_NBYTES: 1.0, DEEP_NBYTES: 2.0}, 20)
    assert chosen[-1] == SHALLOW_NBYTES and chosen.count(DEEP_NBYTES) < 16
    assert repr(depth) == "Depth(1 MiB; 1: 1, 16: 2)"
