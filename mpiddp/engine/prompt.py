"""An all-reduce that all ranks of a node wait for at the same moment, in as few steps of Python as it takes.

Where a call is like one before (dtype, shape, op, factors), what is the same is known: its :class:`Recipe`. Following
it is to do what :func:`~mpiddp.engine.meet.meet` does, word for word. For who does not find everybody at once it is the
beginning of that: the request goes the usual way, which publishes the same once more.

It matters most for tensors of some MiB: by then what Python needs has left the caches, and each thing that is not
touched saves a microsecond.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..collectives import one_shot, select, shared_memory
from ..collectives.base import ReduceOp
from ..collectives.mapped import mapped_reduction
from ..transport.base import Steps
from ..transport.node import MEETING_SLOTS, Node
from ..transport.session import ARRIVED, BASE, DONE, FINGERPRINT, KEY, REDUCED, STAGED, TENSOR, WORDS
from .meet import fingerprint
from .request import Request, Signature

if TYPE_CHECKING:
    from .channel import Channel

__all__ = ["Recipe", "ending", "learn"]

#: Looks for those who have not come yet before the request goes the usual way; after each few the core is given away.
#: Nobody else pushes meanwhile: so not for longer than this, where others take the core.
_LOOKS, _YIELDS_AFTER = 400, 7
_LONGEST_S = 0.002

#: Kinds of which one knows what to do.
_MOST_RECIPES = 128

_memmove, _sched_yield, _monotonic = ctypes.memmove, os.sched_yield, time.monotonic


class _Place:
    """One of the slots of meetings: where this member's words and its peers' lie, and its area."""

    __slots__ = ("address", "combine", "mine", "peers", "slot")

    def __init__(self, node: Node, number: int) -> None:
        self.slot = slot = node.meeting_slot(number)
        self.mine = slot.at + node.rank * WORDS
        self.peers = [slot.at + peer * WORDS for peer in node.peers]
        self.address = 0
        self.combine: Callable[[torch.Tensor], object] | None = None  # None: what is staged does not fit into the areas


class Recipe:
    """How this rank meets the others for all-reduces of one signature, of contiguous tensors on the CPU."""

    looks = _LOOKS

    __slots__ = ("_is_shown", "_mark", "_nbytes", "_node", "_places", "_reduce", "_words", "signature")

    def __init__(self, node: Node, signature: Signature, flat: torch.Tensor) -> None:
        op, scale = ReduceOp(signature.op), signature.scale
        self.signature, self._nbytes = signature, signature.nbytes
        self._node, self._mark = node, fingerprint(signature)
        self._words: Any = node.words
        self._is_shown = shared_memory.is_to_be_shown(flat, node.size)
        self._reduce = mapped_reduction(flat, op, scale, node.size, node.rank) if self._is_shown else None
        self._places = [_Place(node, number) for number in range(MEETING_SLOTS)]
        if node.areas is not None and one_shot.is_possible(node, flat, scale, is_meeting=True):
            for place in self._places:
                place.address = node.areas.address(node.rank, place.slot.number)
                place.combine = one_shot.combination(
                    node, place.slot.number, signature.shape, signature.dtype, op, scale
                )

    def follow(self, key: int, tensor: torch.Tensor) -> bool | Steps:
        """Meet the others under this number and reduce.

        True: it is done. False: it has to go the usual way. Otherwise what is still to be waited for.
        """
        place, words = self._places[key % MEETING_SLOTS], self._words
        slot = place.slot
        if slot.queue:
            return False
        last = slot.base
        for at in place.peers:
            if words[at + DONE] < last:
                return False
        try:
            done = self._show(place, key, tensor) if self._is_shown else self._stage(place, key, tensor)
        except BaseException:
            words[place.mine + KEY] = 0
            raise
        if done is True:
            words[place.mine + DONE] = slot.base = key * BASE
        return done

    def request(self, key: int, tensor: torch.Tensor, answer: Any) -> Request:
        """What goes the usual way; who waits for it gets ``answer``."""
        flat = tensor if tensor.ndim == 1 else tensor.view(-1)
        return Request(key, self.signature, flat, answer=answer, meets=True)

    def _stage(self, place: _Place, key: int, tensor: torch.Tensor) -> bool:
        """Every member adds all that they have staged."""
        if place.combine is None:
            return False
        words, mine, counted = self._words, place.mine, key * BASE + 1
        words[mine + FINGERPRINT] = self._mark
        words[mine + KEY] = key
        _memmove(place.address, tensor.data_ptr(), self._nbytes)
        words[mine + STAGED] = counted
        if not self._have(place.peers, STAGED, counted):
            return False
        place.combine(tensor)
        return True

    def _show(self, place: _Place, key: int, tensor: torch.Tensor) -> bool | Steps:
        """Every member reduces its chunk where it lies and writes it into the others', if all tensors can be mapped."""
        words, node, mine, counted, reduce = self._words, self._node, place.mine, key * BASE + 1, self._reduce
        memory = node.memory
        memory.drop_freed()
        lies = memory.segments.place(tensor)
        if (reduce if lies else place.combine) is None:
            return False
        if lies is None:
            words[mine + TENSOR] = 0
        else:
            node.write_place(mine + TENSOR, lies)
        words[mine + FINGERPRINT] = self._mark
        words[mine + KEY] = key
        words[mine + ARRIVED] = counted
        if lies is None or reduce is None:
            return self._stage(place, key, tensor)
        if not self._have(place.peers, ARRIVED, counted):
            return False
        if not all(words[at + TENSOR] for at in place.peers):
            return self._stage(place, key, tensor)
        at, nbytes = place.slot.at + TENSOR, self._nbytes
        reduce([node.content_at(at + member * WORDS, member, nbytes) for member in range(node.size)])
        words[mine + REDUCED] = counted
        return self._have(place.peers, REDUCED, counted) or self._rest(place, key)

    def _have(self, peers: Sequence[int], counter: int, counted: int) -> bool:
        """Whether all peers come to have counted so far in this meeting, while one is looking.

        None counts so in another: no later one has the slot before this one has ended.
        """
        words, mark, looks, until_s = self._words, self._mark, 0, 0.0
        for at in peers:
            while words[at + counter] != counted or words[at + FINGERPRINT] != mark:
                looks += 1
                if looks & _YIELDS_AFTER == _YIELDS_AFTER:
                    now = _monotonic()
                    until_s = until_s or now + _LONGEST_S
                    if looks >= self.looks or now > until_s:
                        return False
                    _sched_yield()
        return True

    def _rest(self, place: _Place, key: int) -> Steps:
        """What is left: others have not reduced their chunks."""
        place.slot.queue.append(self)
        steps = self._wait_for_others(place, key)
        next(steps)  # from now on it leaves the queue however it ends
        return steps

    def _wait_for_others(self, place: _Place, key: int) -> Steps:
        words, counted = self._words, key * BASE + 1
        try:
            yield None
            while any(words[at + REDUCED] != counted for at in place.peers):
                yield None
            words[place.mine + DONE] = place.slot.base = key * BASE
        finally:
            place.slot.queue.popleft()


def learn(channel: Channel, kind: Any, request: Request) -> None:
    """What to do the next time with an all-reduce of this ``kind``, of which ``request`` was one."""
    node = select.shared_node(channel.link)
    if not request.meets or node is None:
        return
    if len(channel.recipes) >= _MOST_RECIPES:
        channel.recipes.clear()
    channel.recipes[kind] = Recipe(node, request.signature, request.flat)


def ending(channel: Channel, request: Request, rest: Steps) -> Steps:
    """What is left of following a recipe for ``request``, and then it is done."""
    yield from rest
    channel.completed += 1
    request.complete(request.flat)
