"""What differs between ranks, in words."""

from __future__ import annotations

from collections.abc import Sequence

from .request import Key, Kind, Signature, shown_number

__all__ = ["describe"]

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
