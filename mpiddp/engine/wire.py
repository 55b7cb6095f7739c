"""The messages of the negotiation: lists of small tuples, packed by ``marshal``.

``marshal`` is the fastest packer of Python's own; its version 2 is the same in every Python 3, and what is unpacked
comes from the job's own ranks. A tuple that begins with a number of at least 0 is a request, one that begins with a
negative number is a notice of the kind that the number says.
"""

from __future__ import annotations

import marshal
from typing import Any, Final

__all__ = [
    "ALL_LEFT",
    "CYCLE",
    "GONE",
    "JOINED",
    "LEFT",
    "MET",
    "NEWS",
    "RESET",
    "RUN",
    "TABLE_ENTRIES",
    "pack",
    "unpack",
]

_VERSION: Final = 2

#: Entries of the table of names and signatures that a member and its coordinator share; beyond it the table starts
#: anew.
TABLE_ENTRIES: Final = 4096

RUN: Final = -1  # (RUN, numbers or signatures, extents, error, payload): start these requests in one exchange
RESET: Final = -2  # (RESET,): the table starts anew
LEFT: Final = -3  # (LEFT, rank, steps, [launched of each lane]): the rank has shut down, or is about to end
ALL_LEFT: Final = -4  # (ALL_LEFT,): every member has left
GONE: Final = -5  # (GONE,): the coordinator waits for nobody any more
JOINED: Final = -6  # (JOINED, whether anybody has)
CYCLE: Final = -7  # (CYCLE, lane, number): a member has begun this cycle of a lane, and joined ranks are needed
NEWS: Final = -8  # (NEWS, topic, ...): what the parts above the negotiation tell each other
MET: Final = -9  # (MET, key): the members have met, and done what was announced under this key


def pack(message: list[Any]) -> bytes:
    """``message`` as bytes."""
    return marshal.dumps(message, _VERSION)


def unpack(data: bytes) -> list[Any]:
    """The inverse of :func:`pack`."""
    message: list[Any] = marshal.loads(data)
    return message
