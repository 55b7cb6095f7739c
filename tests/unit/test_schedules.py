"""Random programs on random schedules: whatever the order in which ranks submit, messages arrive and engines are
pushed, nobody waits for ever, results are the naive ones, errors say what was wrong, and little is sent.

A failure prints the plan and the seed; ``check`` with these replays it exactly.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, note, settings

from mpiddp.engine import Kind
from tests.judging import check
from tests.programs import Cycle, Epoch, Group, Item, Op, Plan, plans

_SCHEDULES = 16


@given(plans())
@settings(max_examples=50, suppress_health_check=list(HealthCheck))
def test_random_programs(plan: Plan) -> None:
    _on_schedules(plan, range(_SCHEDULES))


@pytest.mark.slow
@given(plans())
@settings(max_examples=650, suppress_health_check=list(HealthCheck))
def test_ten_thousand_schedules(plan: Plan) -> None:
    _on_schedules(plan, range(1000, 1000 + _SCHEDULES))


def _on_schedules(plan: Plan, seeds: range) -> None:
    for seed in seeds:
        note(f"check({plan!r}, seed={seed})")
        check(plan, seed)


_SUM = Op(Kind.ALLREDUCE, is_average=True)
_GATHER = Op(Kind.ALLGATHER)


def _plan(size: int, *epochs: tuple[tuple[Item, ...], tuple[int, ...] | None], **more: object) -> Plan:
    everyone = (tuple(range(size)),)
    return Plan(size, everyone + more.pop("teams", ()), tuple(Epoch(*epoch) for epoch in epochs), **more)  # type: ignore[arg-type,operator]


def _named(name: str, *ops: Op) -> tuple[Op, ...]:
    return tuple(Op(op.kind, op.team, name, op.dtype, op.shape, op.op) for op in ops)


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(_plan(4, ((Cycle(0, 0, (20, 1, 20, 5, 20)),), None)), id="tags of a lane come again"),
        pytest.param(
            _plan(
                4, ((_SUM, _SUM, _GATHER, Op(Kind.ALLGATHER, shape=(2, 0)), Op(Kind.ALLGATHER, dtype="float64")), None)
            ),
            id="tags of negotiated exchanges come again",
        ),
        pytest.param(
            _plan(2, ((*_named("a", _SUM), *_named("b", _SUM), Cycle(0, 0, (1,) * 5)), None)),
            id="a lane fills the room",
        ),
        pytest.param(_plan(2, ((_SUM, _SUM, _SUM), (1, 3))), id="fused with what a rank that joined has not"),
        pytest.param(
            _plan(2, ((_SUM, Op(Kind.ALLREDUCE, is_average=True, brittle=1), _SUM), None)),
            id="one delivery of a fused run fails",
        ),
        pytest.param(_plan(2, ((_SUM,), (0, 1)), ((_SUM,), None)), id="unnamed after a join"),
        pytest.param(_plan(3, ((_SUM, _GATHER), (2, 0, 1))), id="in flight when the last one joins"),
        pytest.param(_plan(3, ((Cycle(0, 0, (5, 1)), Cycle(0, 1, (1,))), (0, 1, 2))), id="another joins in a cycle"),
        pytest.param(
            _plan(3, ((Cycle(0, 0, (5, 1)), Cycle(0, 1, (1,))), (0, 1, 2)), leaves=True), id="leaves in a cycle"
        ),
        pytest.param(
            _plan(2, ((Group(_named("d", _SUM, _SUM, _SUM), shorter=0), Group(_named("d", _SUM, _SUM, _SUM))), None)),
            id="a group's name anew before all of it has failed",
        ),
        pytest.param(
            _plan(
                5,
                ((_SUM, Op(Kind.ALLREDUCE, team=1), _SUM, Op(Kind.BROADCAST, team=1)), (4, 0, 0, 0, 3)),
                teams=((0, 4),),
                leaves=True,
            ),
            id="the coordinator waits elsewhere",
        ),
    ],
)
def test_what_has_gone_wrong_once(plan: Plan) -> None:
    for seed in range(250):
        check(plan, seed)
