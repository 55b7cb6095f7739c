"""The reductions by their public names."""

from __future__ import annotations

import enum

from .collectives.base import ReduceOp

__all__ = ["Average", "Max", "Min", "Op", "Product", "Sum", "resolve"]


class Op(enum.Enum):
    """How the ranks' contributions become one tensor."""

    AVERAGE = "average"
    SUM = "sum"
    MIN = "min"
    MAX = "max"
    PRODUCT = "product"

    def __repr__(self) -> str:
        return f"mpiddp.{self.value.capitalize()}"


Average = Op.AVERAGE
Sum = Op.SUM
Min = Op.MIN
Max = Op.MAX
Product = Op.PRODUCT

_REDUCE = {
    Op.AVERAGE: ReduceOp.SUM,
    Op.SUM: ReduceOp.SUM,
    Op.MIN: ReduceOp.MIN,
    Op.MAX: ReduceOp.MAX,
    Op.PRODUCT: ReduceOp.PRODUCT,
}


def resolve(op: Op, size: int) -> tuple[ReduceOp, float]:
    """The reduction that the ranks perform, and the factor that makes it ``op``."""
    if not isinstance(op, Op):
        raise ValueError(f"op={op!r} is not an operation; it is one of {', '.join(repr(o) for o in Op)}")
    return _REDUCE[op], 1.0 / size if op is Op.AVERAGE else 1.0
