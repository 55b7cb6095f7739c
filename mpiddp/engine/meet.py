"""Who waits for an all-reduce on a node meets the others at once, without asking the coordinator: see
:class:`~mpiddp.transport.session.Meeting`.

Only what has no name and is waited for goes this way: its number is never used again. Where the others do not come
soon, it is announced as well, so that what is mismatched, joined, left or stalled is told as ever; where one of them
does not publish (it does not wait, or shows its timeline), the coordinator starts an exchange for all, and nobody has
met. It starts none where all have announced that they have published: they meet.
"""

from __future__ import annotations

import hashlib
import marshal
import time
from typing import TYPE_CHECKING

from ..collectives import select
from ..collectives.base import ReduceOp
from ..transport.base import Link, Steps
from ..transport.session import Meeting
from .request import Request, Signature
from .running import Running

if TYPE_CHECKING:
    from .channel import Channel

__all__ = ["Gathering", "cancel", "fingerprint", "may_meet", "meet"]

#: Who has waited for so long tells the coordinator. Within it come those who do the same work at the same time.
_ALONE_S = 200e-6

_REMEMBERED = 4096

_fingerprints: dict[Signature, int] = {}


def may_meet(link: Link, nbytes: int) -> bool:
    """Whether an all-reduce of so many bytes on the CPU, whose caller waits, may go this way."""
    return nbytes > 0 and select.shared_node(link) is not None


class Gathering:
    """A request whose members are to meet: whether they have, and the number under which it was announced, or -1."""

    __slots__ = ("_channel", "_number", "meeting", "request")

    def __init__(self, channel: Channel, request: Request, meeting: Meeting) -> None:
        self._channel, self._number = channel, -1
        self.request, self.meeting = request, meeting

    def announce(self) -> None:
        """Tell the coordinator, once, unless they have met."""
        if self._number >= 0 or self.meeting.has_met():
            return
        if self._channel.departures.coordinator_gone:
            raise self._channel.departures.without_coordinator(self.request)
        self._number = self._channel.member.submit(self.request, is_met=True)

    def steps(self) -> Steps:
        """The exchange, from here to its end."""
        channel, request, meeting = self._channel, self.request, self.meeting
        signature = request.signature
        op, scale = ReduceOp(signature.op), signature.scale
        announce_s = time.monotonic() + _ALONE_S
        with meeting:
            for mark in select.allreduce_met(channel.link, meeting, request.flat, op, scale):
                if not meeting.is_met and self._number < 0 and time.monotonic() > announce_s:
                    self.announce()
                yield mark
        channel.completed += 1
        request.complete(request.flat)
        if self._number >= 0:
            channel.member.withdraw(self._number)
            channel.speak()  # now: nothing of this is in flight when its caller goes on


def meet(channel: Channel, request: Request, patience: int = 0) -> bool:
    """Start to meet the others; False where it has to be announced.

    It goes on here until nothing has moved for ``patience`` looks, and then is one of those that run.
    """
    if not channel.may_meet():
        return False
    node, key = channel.link.node, request.key
    assert node is not None and isinstance(key, int)
    meeting = node.meet(key, fingerprint(request.signature))
    if meeting is None:
        return False
    gathering = Gathering(channel, request, meeting)
    running = Running([request], gathering.steps(), gathering=gathering)
    looks = 0
    while looks < patience:
        state = running.resume()
        if state:
            return True
        looks = looks + 1 if state is False else 0
    channel.running.append(running)
    return True


def cancel(channel: Channel, request: Request) -> bool:
    """The coordinator has decided what becomes of ``request``. False where the members have met: then it has not heard
    so yet, and is wrong."""
    for running in channel.running:
        if running.gathering is not None and running.gathering.request is request:
            if running.gathering.meeting.has_met():
                return False
            channel.running = [other for other in channel.running if other is not running]
            running.steps.close()
            break
    return True


def fingerprint(signature: Signature) -> int:
    """The same on every rank, whatever its seed for hashes is; not negative."""
    found = _fingerprints.get(signature)
    if found is None:
        if len(_fingerprints) >= _REMEMBERED:
            _fingerprints.clear()
        digest = hashlib.blake2b(marshal.dumps(tuple(signature), 2), digest_size=8).digest()
        found = _fingerprints[signature] = int.from_bytes(digest, "little") >> 1
    return found
