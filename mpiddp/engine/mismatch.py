"""Why a request cannot run, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..collectives.base import ReduceOp
from ..errors import CollectiveError, MismatchError, RankLeftError, StallError
from .groups import Announced
from .request import Key, Kind, Signature, shown_number

__all__ = ["ERRORS", "describe", "problem"]

#: Errors by the name under which they travel.
ERRORS = {error.__name__: error for error in (MismatchError, RankLeftError, StallError, CollectiveError)}

_HINT = "; ranks that submit unnamed operations must do so in one order"


def describe(key: Key, signatures: Sequence[tuple[int, Signature]], ranks: Sequence[int]) -> str:
    """A sentence that names the request, what differs, the ranks and their values."""
    first = signatures[0][1]
    fields = sorted({name for _, other in signatures for name in first.differing(other)})
    name = repr(key) if isinstance(key, str) else f"the unnamed operation number {shown_number(key)}"
    parts = []
    for field in fields:
        values: dict[str, list[int]] = {}
        for member, signature in signatures:
            values.setdefault(signature.show(field), []).append(ranks[member])
        said = "; ".join(
            f"{value} on rank{'s' if len(holders) > 1 else ''} {', '.join(map(str, holders))}"
            for value, holders in values.items()
        )
        parts.append(f"the {field} is {said}")
    operation = Kind(first.kind).name.lower() if "kind" not in fields else "operation"
    hint = "" if isinstance(key, str) else _HINT
    return f"{operation} of {name}: the ranks disagree: {', and '.join(parts)}{hint}"


def problem(key: Key, record: Announced, ranks: Sequence[int], left: Mapping[int, int]) -> tuple[str, str] | None:
    """None, or the class and the text of the error that every member gets. ``left``: after how many steps who left."""
    kind = Kind(record.signature.kind)
    what = (
        f"{kind.name.lower()} of {key!r}"
        if isinstance(key, str)
        else f"unnamed {kind.name.lower()} number {shown_number(key)}"
    )
    missing = [member for member in range(len(ranks)) if member not in record.numbers]
    gone = [member for member in missing if member in left]
    if gone:
        said = ", ".join(f"rank {ranks[m]} left after {left[m]} steps" for m in gone)
        return RankLeftError.__name__, f"{what}: {said} and will not take part; uneven data? see join()"
    if record.differs:
        return MismatchError.__name__, describe(key, record.signatures(), ranks)
    if missing and not _may_miss(record.signature):
        joined = ", ".join(str(ranks[m]) for m in missing)
        return CollectiveError.__name__, (
            f"{what} cannot run after rank {joined} has joined: only sums and averages can do without a rank"
        )
    return None


def _may_miss(signature: Signature) -> bool:
    if signature.kind == Kind.ALLREDUCE:
        return signature.op == ReduceOp.SUM
    return signature.kind == Kind.BARRIER
