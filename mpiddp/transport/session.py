"""One member's part in one exchange through memory that all members map: its counters, and where its data lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .steps import Steps

if TYPE_CHECKING:
    from .depth import Depth
    from .node import Node, Slot

__all__ = [
    "ARRIVED",
    "BASE",
    "DONE",
    "FINGERPRINT",
    "KEY",
    "REDUCED",
    "STAGED",
    "TAKEN",
    "TENSOR",
    "WORDS",
    "Meeting",
    "Session",
]

#: A member's words in a slot: two cache lines.
WORDS = 16

#: Counters of an exchange: it has come; pieces that it has staged; that it has reduced; that it has taken from others.
ARRIVED, STAGED, REDUCED, TAKEN = range(4)
#: The base of the last exchange that the member has ended; the meeting that it has published.
DONE, KEY, FINGERPRINT = 4, 5, 6
#: How large its staging buffer is.
_STAGED_NBYTES = 7
#: Where its tensor lies, and where its staging buffer does: number (0: nowhere), pid and descriptor, size, offset.
TENSOR, _STAGE = 8, 12

#: Counts within one exchange are below this.
BASE = 1 << 24


class Session:
    """One member's part in one exchange. Ends with the ``with`` block; where that raises, the others wait in vain."""

    __slots__ = ("_mine", "_node", "_slot", "_stage", "_words", "base", "peers", "rank", "size", "slot")

    def __init__(self, node: Node, slot: Slot) -> None:
        self._node, self._slot, self._words = node, slot, node.words
        self.rank, self.size, self.peers, self.base = node.rank, node.size, node.peers, slot.base
        self.slot = slot.number
        self._mine = slot.at + node.rank * WORDS
        self._stage: torch.Tensor | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._end()
        self._slot.queue.popleft()

    def _end(self) -> None:
        if self._stage is not None:
            self._node.retire_stage(self._stage, self._slot)
            self._stage = None
        self._words[self._mine + DONE] = self.base

    def begin_anew(self) -> Steps:
        """Once more from zero, when all members have come so far: for an exchange of several parts, each counted by
        itself. No other exchange has the slot in between."""
        self._end()
        ended = self.base
        self._slot.base = self.base = ended + BASE
        while not self._node.have_ended(self._slot, ended):
            yield None

    # -- counters ------------------------------------------------------------------------------------------------------

    def count(self, counter: int, value: int) -> None:
        """Tell the others: this member has come so far. Everything that it wrote before is seen by who sees that."""
        self._words[self._mine + counter] = self.base + value

    def have(self, counter: int, value: int) -> bool:
        """Whether all peers have counted so far."""
        words, at, wanted = self._words, self._slot.at + counter, self.base + value
        return min([words[at + peer * WORDS] for peer in self.peers]) >= wanted

    def has(self, peer: int, counter: int, value: int) -> bool:
        """Whether one peer has counted so far."""
        return self._words[self._slot.at + peer * WORDS + counter] >= self.base + value

    def wait(self, counter: int, value: int) -> Steps:
        """Until all peers have counted so far."""
        while not self.have(counter, value):
            yield None

    # -- places --------------------------------------------------------------------------------------------------------

    def show(self, flat: torch.Tensor) -> bool:
        """Tell the others where ``flat`` lies, to be read after ARRIVED is counted; False if they cannot map it."""
        return self._write_place(TENSOR, flat)

    def _write_place(self, field: int, flat: torch.Tensor) -> bool:
        words, at = self._words, self._mine + field
        memory = self._node.memory
        memory.drop_freed()
        place = memory.segments.place(flat) if flat.numel() else None
        if place is None:
            words[at] = 0
            return False
        self._node.write_place(at, place)
        return True

    def all_shown(self) -> bool:
        """Whether every member's tensor can be mapped: the same answer on all of them, once all have arrived."""
        words, at = self._words, self._slot.at + TENSOR
        return all(words[at + member * WORDS] for member in range(self.size))

    def is_shown(self, member: int) -> bool:
        """Whether this member's tensor can be mapped."""
        return self._words[self._slot.at + member * WORDS + TENSOR] != 0

    def tensor(self, peer: int, like: torch.Tensor) -> torch.Tensor:
        """A peer's tensor, of the dtype and the length of ``like``."""
        return torch.from_numpy(self.content(peer, like.nbytes)).view(like.dtype)

    def content(self, peer: int, nbytes: int) -> np.ndarray[Any, Any]:
        """A peer's tensor, or the beginning of it, as bytes."""
        return self._read_place(TENSOR, peer, nbytes)

    def stage(self, nbytes: int) -> torch.Tensor:
        """A staging buffer of this member's own, as bytes, to be read after STAGED is counted."""
        if self._stage is None:
            self._stage = self._node.take_stage(nbytes)
            self._write_place(_STAGE, self._stage)
            self._words[self._mine + _STAGED_NBYTES] = nbytes
        return self._stage

    @property
    def depth(self) -> Depth:
        """What is known of how deep staging buffers should be."""
        return self._node.depth

    def staged_nbytes(self, peer: int) -> int:
        """The size of a peer's staging buffer, after it has counted STAGED."""
        return self._words[self._slot.at + peer * WORDS + _STAGED_NBYTES]

    def peer_stage(self, peer: int, nbytes: int) -> torch.Tensor:
        """A peer's staging buffer, or the beginning of it."""
        return torch.from_numpy(self.staged(peer, nbytes))

    def staged(self, peer: int, nbytes: int) -> np.ndarray[Any, Any]:
        """:meth:`peer_stage` as an array."""
        return self._read_place(_STAGE, peer, nbytes)

    def _read_place(self, field: int, peer: int, nbytes: int) -> np.ndarray[Any, Any]:
        return self._node.content_at(self._slot.at + peer * WORDS + field, peer, nbytes)


class Meeting(Session):
    """An exchange that needs no negotiation: each member publishes its number and what it is, and whoever sees that all
    have published the same goes on. ``key`` numbers what the members do in the same order, and is never used twice.

    A member may publish or not, and a peer that finds none waits in vain: then the request must be negotiated. What all
    members have published is done, by all of them, and never negotiated as well.

    Until they have met no counter counts: those in the slot may be of a later meeting.
    """

    __slots__ = ("_fingerprint", "_key", "is_met")

    def __init__(self, node: Node, slot: Slot, key: int, fingerprint: int) -> None:
        super().__init__(node, slot)
        self.base = key * BASE
        self.is_met = False
        self._key, self._fingerprint = key, fingerprint
        self._words[self._mine + FINGERPRINT] = fingerprint
        self._words[self._mine + KEY] = key

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._slot.base = self.base
        else:
            self._words[self._mine + KEY] = 0
        super().__exit__(kind, *rest)

    def has_met(self) -> bool:
        """Whether all peers have published the same."""
        return self.is_met or self._look()

    def _look(self) -> bool:
        words, at = self._words, self._slot.at
        for peer in self.peers:
            found = at + peer * WORDS
            if words[found + KEY] != self._key or words[found + FINGERPRINT] != self._fingerprint:
                return False
        self.is_met = True
        return True

    def have(self, counter: int, value: int) -> bool:
        """See :meth:`Session.have`."""
        return (self.is_met or self._look()) and super().have(counter, value)

    def has(self, peer: int, counter: int, value: int) -> bool:
        """See :meth:`Session.has`."""
        return (self.is_met or self._look()) and super().has(peer, counter, value)
