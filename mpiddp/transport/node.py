"""Exchanges through memory that all members map, where they are on one node: who has come how far, and whose data lie
where.

A page has slots. An exchange takes the slot of its tag, or of its meeting's number; in it each member has words that it
alone writes: counters, and the places of its tensor and of its staging buffer. Counters never go back: an exchange
counts from a base that is above all that earlier exchanges in the slot have counted to, so that nothing is ever reset
and a member that is slow cannot mistake one exchange for another.

An aligned word is written at once, and what was written before it is seen before it by whoever sees it: so it is on
x86. Elsewhere a fence would be needed, which Python does not have: there no memory counts as shared.

Cost, from Python: 0.1 us to write a word or to read a peer's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..memory.mapping import Place
from ..memory.node import NodeMemory
from ..memory.shared import HEADER_NBYTES, share
from .areas import Areas
from .depth import Depth
from .session import BASE, DONE, WORDS, Meeting, Session
from .steps import Until
from .tags import FIRST_TAG, LANE_TAGS, LANES

__all__ = ["MEETINGS_AT", "MEETING_SLOTS", "PAGE_NBYTES", "Node", "Slot"]

#: Slots of negotiated exchanges, of which an engine runs 16 at once, and of each lane.
_NEGOTIATED_SLOTS = 32
_LANE_SLOTS = 16

#: Slots of meetings. Who waits for one has no other in flight but from other threads. With one slot each would wait for
#: the last one's end on all members; the more slots, the less of what is staged in them stays in the caches.
MEETING_SLOTS = 2
MEETINGS_AT = _NEGOTIATED_SLOTS + LANES * _LANE_SLOTS
_SLOTS = MEETINGS_AT + MEETING_SLOTS

#: What is packed may be in shared memory up to so many bytes; so many such buffers are kept.
_LENT_NBYTES = 8 << 20
_SPARE = 2

#: The page's size for each member.
PAGE_NBYTES = _SLOTS * WORDS * 8


class Slot:
    """What this member knows of a slot. ``queue``: who has it, and who waits for it, in order.

    ``base``: of the exchange that has it; of meetings, of the last one that this member has ended."""

    __slots__ = ("at", "base", "number", "period", "queue", "tag")

    def __init__(self, number: int, at: int, period: int) -> None:
        self.number, self.at, self.period = number, at, period
        self.queue: deque[object] = deque()
        self.base = 0
        self.tag = -1

    def advance(self, tag: int) -> None:
        """The base of the next exchange: the same on all members, whatever they did before, within a cycle of tags."""
        steps = tag - self.tag if tag > self.tag else tag - self.tag + self.period
        self.base += steps * BASE
        self.tag = tag


class Node:
    """``page`` holds PAGE_NBYTES a member, zeros at first. ``local_ranks`` are the members' ranks among the node's.

    State: belongs to whoever pushes the channel.
    """

    def __init__(self, page: memoryview, local_ranks: Sequence[int], rank: int, memory: NodeMemory) -> None:
        self.rank, self.size = rank, len(local_ranks)
        self.peers = [(rank + distance) % self.size for distance in range(1, self.size)]
        self.memory = memory
        self.words = page.cast("q")
        self.local_ranks = list(local_ranks)
        self.areas: Areas | None = None
        self.depth = Depth()
        self._slots: dict[int, Slot] = {}
        self._spare: list[torch.Tensor] = []
        self._lent: dict[int, torch.Tensor] = {}
        self._stages: list[tuple[torch.Tensor, Slot, int]] = []  # and the last exchange of this member that used it

    @classmethod
    def over(cls, comm: Any, local_ranks: Sequence[int], memory: NodeMemory) -> Node | None:
        """For the members of ``comm``, all on one node; None, on all of them, where they cannot share. Collective."""
        if comm.size == 1 or not memory.is_shared:
            return None
        page = share(comm, HEADER_NBYTES + PAGE_NBYTES * comm.size)
        if page is None:
            return None
        node = cls(memoryview(page)[HEADER_NBYTES:], local_ranks, comm.rank, memory)
        node.areas = Areas.over(comm, local_ranks, memory, MEETINGS_AT, MEETING_SLOTS)
        return node

    def enter(self, tag: int) -> Until[Session]:
        """Wait for the tag's slot; all members enter with the same tags in the same order. Use it in a ``with``."""
        slot = self._slot(tag)
        ticket = object()
        slot.queue.append(ticket)
        while slot.queue[0] is not ticket or not self.have_ended(slot, slot.base):
            yield None
        slot.advance(tag)
        return Session(self, slot)

    def meet(self, key: int, fingerprint: int) -> Meeting | None:
        """The meeting with that number, to be used in a ``with``; None while its slot is in use."""
        slot = self.meeting_slot(key)
        if slot.queue or not self.have_ended(slot, slot.base):
            return None
        meeting = Meeting(self, slot, key, fingerprint)
        slot.queue.append(meeting)
        return meeting

    def meeting_slot(self, key: int) -> Slot:
        """That of the meeting with this number."""
        number = MEETINGS_AT + key % MEETING_SLOTS
        slot = self._slots.get(number)
        if slot is None:
            slot = self._slots[number] = Slot(number, number * self.size * WORDS, 0)
        return slot

    def write_place(self, at: int, place: Place) -> None:
        """Tell the others, in the four words from ``at`` on, where something lies."""
        number, pid, fd, of_segment, offset = place
        words = self.words
        words[at], words[at + 1], words[at + 2], words[at + 3] = number, pid << 32 | fd & 0xFFFFFFFF, of_segment, offset

    def content_at(self, at: int, member: int, nbytes: int) -> np.ndarray[Any, Any]:
        """So many bytes of what lies where the four words of ``member`` from ``at`` on say."""
        number, owner, of_segment, offset = self.words[at : at + 4].tolist()
        place = number, owner >> 32, owner & 0xFFFFFFFF, of_segment, offset
        return self.memory.content(self.local_ranks[member], place, nbytes)

    def _slot(self, tag: int) -> Slot:
        if tag < FIRST_TAG:
            number, period = tag % _NEGOTIATED_SLOTS, FIRST_TAG
        else:
            lane, turn = divmod(tag - FIRST_TAG, LANE_TAGS)
            number, period = _NEGOTIATED_SLOTS + lane * _LANE_SLOTS + turn % _LANE_SLOTS, LANE_TAGS
        slot = self._slots.get(number)
        if slot is None:
            slot = self._slots[number] = Slot(number, number * self.size * WORDS, period)
        return slot

    def have_ended(self, slot: Slot, base: int) -> bool:
        """Whether every member has ended the exchange with that base."""
        at = slot.at + DONE
        return min(self.words[at : at + self.size * WORDS : WORDS].tolist()) >= base

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
        return stage.zero_()  # page by page it would be taken while copies are timed

    def retire_stage(self, stage: torch.Tensor, slot: Slot) -> None:
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
