"""Programs for a simulated world: what each rank submits, in which order, and how it ends.

A program is a list of items in one order. Ranks submit them in orders of their own, and wait where they like, as far
as that is legal: unnamed operations keep their order, a name is free again before it is used anew, and whoever waits
for an item has submitted all those before it (so that somebody can always go on). In an epoch with ``counts`` rank r
takes part in the first ``counts[r]`` items alone, and then joins, or in the last epoch leaves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import strategies as st

from mpiddp.collectives.base import ReduceOp
from mpiddp.engine import Kind

__all__ = ["Cycle", "Epoch", "Group", "Item", "Op", "Plan", "plans"]


@dataclass(frozen=True)
class Op:
    """One collective. ``odd``: a rank (modulo the members) that differs in a field.

    ``eager``, ``meets``: on which ranks, as bits.

    ``brittle``: a rank on which the delivery of the result raises.
    """

    kind: Kind
    team: int = 0
    name: str | None = None
    dtype: str = "float32"
    shape: tuple[int, ...] = (3,)
    op: ReduceOp = ReduceOp.SUM
    is_average: bool = False
    root: int = 0
    eager: int = 0
    meets: int = 0
    odd: int | None = None
    field: str = "kind"
    brittle: int | None = None


@dataclass(frozen=True)
class Group:
    """Operations that run together. ``shorter``: a rank (modulo the members) that leaves the last one out."""

    ops: tuple[Op, ...]
    shorter: int | None = None

    @property
    def team(self) -> int:
        return self.ops[0].team

    @property
    def name(self) -> str | None:
        return self.ops[0].name


@dataclass(frozen=True)
class Cycle:
    """An optimizer's step: exchanges of so many elements each, without negotiation."""

    team: int
    lane: int
    buckets: tuple[int, ...]


Item = Op | Group | Cycle


@dataclass(frozen=True)
class Epoch:
    items: tuple[Item, ...]
    counts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Plan:
    """``leaves``: in the last epoch with ``counts`` ranks leave rather than join. ``hasty``: ranks that do not wait for
    the others when they leave. ``order`` goes into what the ranks' own orders are drawn from."""

    size: int
    teams: tuple[tuple[int, ...], ...]
    epochs: tuple[Epoch, ...]
    leaves: bool = False
    hasty: frozenset[int] = frozenset()
    order: int = 0

    def members(self, team: int) -> tuple[int, ...]:
        return self.teams[team]

    def present(self, epoch: int, index: int) -> tuple[int, ...]:
        """Who takes part in an item."""
        items, counts = self.epochs[epoch].items, self.epochs[epoch].counts
        members = self.members(items[index].team)
        return members if counts is None else tuple(rank for rank in members if index < counts[rank])

    def has_left(self, epoch: int) -> bool:
        """Whether the ranks without data in this epoch have left, rather than joined."""
        return self.leaves and epoch == len(self.epochs) - 1


_DTYPES = (*["float32"] * 5, "float64", "float16", "bfloat16", "int32", "int64", "uint8", "int8")
_FIELDS = ("kind", "dtype", "shape", "op", "root", "scale")
_RANKS = st.integers(0, 7)
_seldom = st.sampled_from([None] * 7 + [0])


@st.composite
def _ops(draw: st.DrawFn, teams: tuple[tuple[int, ...], ...], kinds: tuple[Kind, ...], is_sound: bool = False) -> Op:
    kind, team = draw(st.sampled_from(kinds)), draw(st.integers(0, len(teams) - 1))
    op = draw(st.sampled_from([ReduceOp.SUM] * 4 + list(ReduceOp))) if kind is Kind.ALLREDUCE else ReduceOp.SUM
    if kind is Kind.REDUCESCATTER:
        op = draw(st.sampled_from([ReduceOp.SUM, ReduceOp.MIN, ReduceOp.MAX, ReduceOp.PRODUCT]))
    if op is ReduceOp.ADASUM and len(teams[team]).bit_count() > 1:
        op = ReduceOp.SUM  # it takes a power of two
    dtypes = _DTYPES
    if op in (ReduceOp.MIN, ReduceOp.MAX) or kind in (Kind.BROADCAST, Kind.ALLGATHER, Kind.ALLTOALL):
        dtypes += ("bool",)
    if op is ReduceOp.ADASUM:
        dtypes = ("float32", "float64")
    made = Op(
        kind,
        team=team,
        name=draw(st.sampled_from([None, None, "a", "b", "c", "d"])),
        dtype=draw(st.sampled_from(dtypes)),
        shape=draw(st.sampled_from([(3,), (1,), (4, 2), (0,), (17,), (2, 0)])),
        op=op,
        is_average=op is ReduceOp.SUM and draw(st.booleans()),
        root=draw(_RANKS) if kind is Kind.BROADCAST else 0,
        eager=draw(st.sampled_from([0, 0, 255, 0b10101])),
        meets=draw(st.sampled_from([0, 255, 255, 0b10101])),
    )
    if is_sound or draw(_seldom) is None:
        return made
    if draw(st.booleans()):
        return replace(made, brittle=draw(_RANKS))
    return replace(made, odd=draw(_RANKS), field=draw(st.sampled_from(_FIELDS)))


_KINDS = (
    *[Kind.ALLREDUCE] * 5,
    *[Kind.BROADCAST] * 2,
    *[Kind.ALLGATHER] * 2,
    Kind.BARRIER,
    Kind.ALLTOALL,
    Kind.REDUCESCATTER,
)


@st.composite
def _groups(draw: st.DrawFn, teams: tuple[tuple[int, ...], ...]) -> Group:
    kind = draw(st.sampled_from([Kind.ALLREDUCE, Kind.ALLREDUCE, Kind.ALLGATHER, Kind.REDUCESCATTER]))
    first = draw(_ops(teams, (kind,), is_sound=True))
    others = draw(st.lists(_ops((teams[first.team],), (kind,)), max_size=2))
    ops = tuple(replace(op, team=first.team, name=first.name, eager=0, meets=0) for op in (first, *others))
    may_be_shorter = first.name is not None and len(ops) > 1
    return Group(ops, draw(_RANKS) if may_be_shorter and draw(_seldom) is not None else None)


def _cycles(teams: st.SearchStrategy[int]) -> st.SearchStrategy[Cycle]:
    buckets = st.lists(st.sampled_from([1, 5, 20]), min_size=1, max_size=5)
    return st.builds(Cycle, team=teams, lane=st.integers(0, 1), buckets=buckets.map(tuple))


@st.composite
def _teams(draw: st.DrawFn, size: int) -> tuple[tuple[int, ...], ...]:
    sets = draw(st.lists(st.sets(st.integers(0, size - 1), min_size=1), max_size=3))
    return (tuple(range(size)), *dict.fromkeys(tuple(sorted(team)) for team in sets if len(team) < size))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans for 1 to 8 ranks."""
    size = draw(st.sampled_from([1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8]))
    teams = draw(_teams(size))
    ends = draw(st.sampled_from(["together", "join", "join", "leave"]))
    items = st.one_of(_ops(teams, _KINDS), _ops(teams, _KINDS), _groups(teams), _cycles(st.integers(0, len(teams) - 1)))
    epochs = []
    for _ in range(draw(st.sampled_from([1, 1, 2]))):
        these = tuple(draw(st.lists(items, min_size=1, max_size=8)))
        counts = None
        if ends == "join":
            counts = tuple(draw(st.lists(st.integers(0, len(these)), min_size=size, max_size=size)))
        epochs.append(Epoch(these, counts))
    if ends == "leave":
        last = epochs[-1].items
        epochs[-1] = Epoch(last, tuple(draw(st.lists(st.integers(0, len(last)), min_size=size, max_size=size))))
    hasty = draw(st.sets(st.integers(0, size - 1))) if draw(st.sampled_from([0, 0, 1])) else set()
    return Plan(size, teams, tuple(epochs), ends == "leave", frozenset(hasty), draw(st.integers(0, 1 << 16)))
