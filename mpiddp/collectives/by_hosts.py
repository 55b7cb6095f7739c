"""How the hosts of ranks whose GPUs work together tell each other what they must know, and when."""

from __future__ import annotations

import torch

from ..transport.base import Link
from ..transport.steps import Until
from . import ring

__all__ = ["gather_bytes", "gather_words", "host_of"]

#: Room for what a member has to say, such as why it cannot do something.
_WORDS_NBYTES = 240


def host_of(link: Link) -> Link:
    """The members' hosts."""
    return getattr(link, "host", link)


def gather_bytes(link: Link, own: bytes, nbytes: int, tag: int) -> Until[list[bytes]]:
    """Every member's ``nbytes`` bytes; nobody has them before everybody has come."""
    table = torch.zeros(link.size * nbytes, dtype=torch.uint8, device="cpu")
    bounds = [(nbytes * member, nbytes * (member + 1)) for member in range(link.size)]
    lo, hi = bounds[link.rank]
    table[lo:hi] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    yield from ring.allgather(link, table, bounds, tag)
    content = table.numpy().tobytes()
    return [content[lo:hi] for lo, hi in bounds]


def gather_words(link: Link, own: str, tag: int) -> Until[list[str]]:
    """What every member has to say, cut to 240 bytes."""
    padded = own.encode()[:_WORDS_NBYTES].ljust(_WORDS_NBYTES, b"\0")
    said = yield from gather_bytes(link, padded, _WORDS_NBYTES, tag)
    return [words.rstrip(b"\0").decode(errors="replace") for words in said]
