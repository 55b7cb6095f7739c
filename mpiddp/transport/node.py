"""Exchanges through memory that all members map, where they are on one node: who has come how far, and whose data lie
where.

A page has slots. An exchange takes the slot of its tag; in it each member has words that it alone writes: counters, and
the places of its tensor and of its staging buffer. Counters never go back: an exchange counts from a base that is above
all that earlier exchanges in the slot have counted to, so that nothing is ever reset and a member that is slow cannot
mistake one exchange for another.

An aligned word is written at once, and what was written before it is seen before it by whoever sees it: so it is on
x86. Elsewhere a fence would be needed, which Python does not have: there no memory counts as shared.

Cost, from Python: 0.1 us to write a word or to read a peer's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from ..memory.node import NodeMemory
from ..memory.shared import HEADER_NBYTES, share
from .areas import Areas
from .steps import Steps, Until
from .tags import FIRST_TAG, LANE_TAGS, LANES

__all__ = ["ARRIVED", "PAGE_NBYTES", "REDUCED", "STAGED", "TAKEN", "Node", "Session"]

#: Slots of negotiated exchanges, of which an engine runs 16 at once, and of each lane.
_NEGOTIATED_SLOTS = 32
_LANE_SLOTS = 16
_SLOTS = _NEGOTIATED_SLOTS + LANES * _LANE_SLOTS

#: A member's words in a slot: two cache lines.
_WORDS = 16

#: Counters of an exchange: it has come; pieces that it has staged; that it has reduced; that it has taken from others.
ARRIVED, STAGED, REDUCED, TAKEN = range(4)
#: The base of the last exchange that the member has ended.
_DONE = 4
#: Where its tensor lies, and where its staging buffer does: number (0: nowhere), pid and descriptor, size, offset.
_TENSOR, _STAGE = 8, 12

#: Counts within one exchange are below this.
_BASE = 1 << 24

#: What is packed may be in shared memory up to so many bytes; so many such buffers are kept.
_LENT_NBYTES = 8 << 20
_SPARE = 2

#: The page's size for each member.
PAGE_NBYTES = _SLOTS * _WORDS * 8


class _Slot:
    """What this member knows of a slot. ``queue``: who has it, and who waits for it, in order."""

    __slots__ = ("at", "base", "number", "period", "queue", "tag")

    def __init__(self, number: int, at: int, period: int) -> None:
        self.number, self.at, self.period = number, at, period
        self.queue: deque[object] = deque()
        self.base = 0
        self.tag = -1

    def advance(self, tag: int) -> None:
        """The base of the next exchange: the same on all members, whatever they did before, within a cycle of tags."""
        steps = tag - self.tag if tag > self.tag else tag - self.tag + self.period
        self.base += steps * _BASE
        self.tag = tag


class Node:
    """``page`` holds PAGE_NBYTES a member, zeros at first. ``local_ranks`` are the members' ranks among the node's.

    State: belongs to whoever pushes the channel.
    """

    def __init__(self, page: memoryview, local_ranks: Sequence[int], rank: int, memory: NodeMemory) -> None:
        self.rank, self.size = rank, len(local_ranks)
        self.memory = memory
        self.words = page.cast("q")
        self.local_ranks = list(local_ranks)
        self.areas: Areas | None = None
        self._slots: dict[int, _Slot] = {}
        self._spare: list[torch.Tensor] = []
        self._lent: dict[int, torch.Tensor] = {}
        self._stages: list[tuple[torch.Tensor, _Slot, int]] = []  # and the last exchange of this member that used it

    @classmethod
    def over(cls, comm: Any, local_ranks: Sequence[int], memory: NodeMemory) -> Node | None:
        """For the members of ``comm``, all on one node; None, on all of them, where they cannot share. Collective."""
        if comm.size == 1 or not memory.is_shared:
            return None
        page = share(comm, HEADER_NBYTES + PAGE_NBYTES * comm.size)
        if page is None:
            return None
        node = cls(memoryview(page)[HEADER_NBYTES:], local_ranks, comm.rank, memory)
        node.areas = Areas.over(comm, local_ranks, memory, _SLOTS)
        return node

    def enter(self, tag: int) -> Until[Session]:
        """Wait for the tag's slot; all members enter with the same tags in the same order. Use it in a ``with``."""
        slot = self._slot(tag)
        ticket = object()
        slot.queue.append(ticket)
        while slot.queue[0] is not ticket or not self.have_ended(slot, slot.base):
            yield None
        slot.advance(tag)
        self.memory.drop_freed()
        return Session(self, slot)

    def _slot(self, tag: int) -> _Slot:
        if tag < FIRST_TAG:
            number, period = tag % _NEGOTIATED_SLOTS, FIRST_TAG
        else:
            lane, turn = divmod(tag - FIRST_TAG, LANE_TAGS)
            number, period = _NEGOTIATED_SLOTS + lane * _LANE_SLOTS + turn % _LANE_SLOTS, LANE_TAGS
        slot = self._slots.get(number)
        if slot is None:
            slot = self._slots[number] = _Slot(number, number * self.size * _WORDS, period)
        return slot

    def have_ended(self, slot: _Slot, base: int) -> bool:
        """Whether every member has ended the exchange with that base."""
        words, at = self.words, slot.at + _DONE
        return all(words[at + member * _WORDS] >= base for member in range(self.size))

    def take_stage(self, nbytes: int) -> torch.Tensor:
        """A staging buffer that nobody reads any more, the one used last if possible: it is still in the cache."""
        for index in reversed(range(len(self._stages))):
            stage, slot, base = self._stages[index]
            if stage.nbytes == nbytes and self.have_ended(slot, base):
                del self._stages[index]
                return stage
        stage = self.memory.segments.empty((nbytes,), torch.uint8)
        if self.memory.segments.place(stage) is None:
            raise OSError(
                f"rank {self.rank} of {self.size} on this node: no {nbytes} bytes of shared memory are left to stage "
                "an exchange in; raise the limit on memory or on open files (ulimit -n)"
            )
        return stage

    def retire_stage(self, stage: torch.Tensor, slot: _Slot) -> None:
        """Used up to here: free once all members have ended the exchange that has the slot now."""
        self._stages.append((stage, slot, slot.base))

    # -- buffers for what is packed ------------------------------------------------------------------------------------

    def lend(self, nbytes: int) -> torch.Tensor | None:
        """Shared memory of at least so many bytes; None where that is too much to be kept for the next time.

        The exchange must have ended on all members, for its peers may write it, before it is taken back.
        """
        if nbytes > _LENT_NBYTES:
            return None
        buffer = self._spare.pop() if self._spare else self.memory.segments.empty((_LENT_NBYTES,), torch.uint8)
        self._lent[buffer.data_ptr()] = buffer
        return buffer

    def take_back(self, tensor: torch.Tensor) -> None:
        """A tensor at the beginning of what was lent, or of anything else, is needed no more."""
        buffer = self._lent.pop(tensor.data_ptr(), None)
        if buffer is not None and len(self._spare) < _SPARE:
            self._spare.append(buffer)

    def __repr__(self) -> str:
        return f"Node(member {self.rank} of {self.size}, {len(self._stages)} staging buffers, {self.memory!r})"


class Session:
    """One member's part in one exchange. Ends with the ``with`` block; where that raises, the others wait in vain."""

    __slots__ = ("_mine", "_node", "_slot", "_stage", "_words", "base", "peers", "rank", "size", "slot")

    def __init__(self, node: Node, slot: _Slot) -> None:
        self._node, self._slot, self._words = node, slot, node.words
        self.rank, self.size, self.base = node.rank, node.size, slot.base
        self.slot = slot.number
        self._mine = slot.at + node.rank * _WORDS
        self.peers = [(node.rank + distance) % node.size for distance in range(1, node.size)]
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
        self._words[self._mine + _DONE] = self.base

    def begin_anew(self) -> Steps:
        """Once more from zero, when all members have come so far: for an exchange of several parts, each counted by
        itself. No other exchange has the slot in between."""
        self._end()
        ended = self.base
        self._slot.base = self.base = ended + _BASE
        while not self._node.have_ended(self._slot, ended):
            yield None

    # -- counters ------------------------------------------------------------------------------------------------------

    def count(self, counter: int, value: int) -> None:
        """Tell the others: this member has come so far. Everything that it wrote before is seen by who sees that."""
        self._words[self._mine + counter] = self.base + value

    def have(self, counter: int, value: int) -> bool:
        """Whether all peers have counted so far."""
        words, at, wanted = self._words, self._slot.at + counter, self.base + value
        return all(words[at + peer * _WORDS] >= wanted for peer in self.peers)

    def has(self, peer: int, counter: int, value: int) -> bool:
        """Whether one peer has counted so far."""
        return self._words[self._slot.at + peer * _WORDS + counter] >= self.base + value

    def least(self, counter: int) -> int:
        """How far the last of the peers has counted; not above what this exchange counts to."""
        words, at = self._words, self._slot.at + counter
        return min([words[at + peer * _WORDS] for peer in self.peers]) - self.base

    def wait(self, counter: int, value: int) -> Steps:
        """Until all peers have counted so far."""
        while not self.have(counter, value):
            yield None

    # -- places --------------------------------------------------------------------------------------------------------

    def show(self, flat: torch.Tensor) -> bool:
        """Tell the others where ``flat`` lies, to be read after ARRIVED is counted; False if they cannot map it."""
        return self._write_place(_TENSOR, flat)

    def _write_place(self, field: int, flat: torch.Tensor) -> bool:
        words, at = self._words, self._mine + field
        place = self._node.memory.segments.place(flat) if flat.numel() else None
        if place is None:
            words[at] = 0
            return False
        number, pid, fd, nbytes, offset = place
        words[at], words[at + 1], words[at + 2], words[at + 3] = number, pid << 32 | fd & 0xFFFFFFFF, nbytes, offset
        return True

    def all_shown(self) -> bool:
        """Whether every member's tensor can be mapped: the same answer on all of them, once all have arrived."""
        words, at = self._words, self._slot.at + _TENSOR
        return all(words[at + member * _WORDS] for member in range(self.size))

    def is_shown(self, member: int) -> bool:
        """Whether this member's tensor can be mapped."""
        return self._words[self._slot.at + member * _WORDS + _TENSOR] != 0

    def tensor(self, peer: int, like: torch.Tensor) -> torch.Tensor:
        """A peer's tensor, of the dtype and the length of ``like``."""
        return self._read_place(_TENSOR, peer, like.nbytes).view(like.dtype)

    def stage(self, nbytes: int) -> torch.Tensor:
        """A staging buffer of this member's own, as bytes, to be read after STAGED is counted."""
        if self._stage is None:
            self._stage = self._node.take_stage(nbytes)
            self._write_place(_STAGE, self._stage)
        return self._stage

    def peer_stage(self, peer: int, nbytes: int) -> torch.Tensor:
        """A peer's staging buffer, or the beginning of it."""
        return self._read_place(_STAGE, peer, nbytes)

    def _read_place(self, field: int, peer: int, nbytes: int) -> torch.Tensor:
        at = self._slot.at + peer * _WORDS + field
        number, owner, of_segment, offset = self._words[at : at + 4].tolist()
        place = number, owner >> 32, owner & 0xFFFFFFFF, of_segment, offset
        return self._node.memory.tensor(self._node.local_ranks[peer], place, nbytes)
