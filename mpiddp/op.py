"""The reductions by their public names."""

from __future__ import annotations

import enum

from .collectives import adasum
from .collectives.base import ReduceOp

__all__ = ["Adasum", "Average", "Max", "Min", "Op", "Product", "Sum", "resolve"]


class Op(enum.Enum):
    """How the ranks' contributions become one tensor."""

    AVERAGE = "average"
    SUM = "sum"
    ADASUM = "adasum"
    MIN = "min"
    MAX = "max"
    PRODUCT = "product"

    def __repr__(self) -> str:
        return f"mpiddp.{self.value.capitalize()}"


Average = Op.AVERAGE
Sum = Op.SUM
Adasum = Op.ADASUM
Min = Op.MIN
Max = Op.MAX
Product = Op.PRODUCT

_REDUCE = {
    Op.AVERAGE: ReduceOp.SUM,
    Op.SUM: ReduceOp.SUM,
    Op.ADASUM: ReduceOp.ADASUM,
    Op.MIN: ReduceOp.MIN,
    Op.MAX: ReduceOp.MAX,
    Op.PRODUCT: ReduceOp.PRODUCT,
}


def resolve(op: Op | None, average: bool | None, size: int) -> tuple[ReduceOp, int]:
    """The reduction that ``size`` ranks perform, and what its result is divided by; ``average`` is the old spelling."""
    if average is not None:
        if op is not None:
            raise ValueError("average= and op= were both given; average= is deprecated, use op= alone")
        op = Average if average else Sum
    elif op is None:
        op = Average
    elif not isinstance(op, Op):
        raise ValueError(f"op={op!r} is not an operation; it is one of {', '.join(repr(o) for o in Op)}")
    if op is Adasum:
        adasum.check_size(size)
    return _REDUCE[op], size if op is Average else 1
