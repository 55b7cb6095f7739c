"""What a coordinator's notices change on a member: who has joined, who has left, what others tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import CollectiveError
from .meet import cancel
from .request import Kind
from .wire import ALL_LEFT, CYCLE, GONE, JOINED, LEFT, NEWS

if TYPE_CHECKING:
    from .channel import Channel

__all__ = ["heed"]


def heed(channel: Channel, notice: tuple[Any, ...]) -> None:
    """Act on one notice. Called under the engine's lock."""
    kind = notice[0]
    if kind == LEFT:
        _left(channel, *notice[1:])
    elif kind == CYCLE:
        _cycle(channel, notice[1], notice[2])
    elif kind == JOINED:
        _joined(channel, notice[1])
    elif kind == ALL_LEFT:
        channel.departures.everybody = True
    elif kind == GONE:
        _coordinator_gone(channel)
    elif kind == NEWS and notice[1] in channel.news:
        channel.news[notice[1]](*notice[2:])


def _joined(channel: Channel, somebody: bool) -> None:
    channel.somebody_joined = somebody
    if somebody and not channel.member.joining():
        for lane in channel.lanes:  # anew for each that joins: it has not heard earlier calls
            if lane.is_in_cycle:
                lane.call_joined()


def _cycle(channel: Channel, number: int, cycle: int) -> None:
    """Others, at ``cycle`` of a lane, need this rank, which has joined."""
    if number < len(channel.lanes):
        channel.lanes[number].wanted_cycle = max(channel.lanes[number].wanted_cycle, cycle)
        return
    error = CollectiveError(
        f"rank {channel.ranks[channel.link.rank]} has joined, and others train with DistributedOptimizer number "
        f"{number + 1}, while it has made {len(channel.lanes)}: make the same ones on every rank"
    )
    for request in channel.member.waiting.values():
        if request.signature.kind == Kind.JOIN:
            request.fail(error)


def _left(channel: Channel, rank: int, steps: int, launched: Sequence[int]) -> None:
    channel.departures.left[rank] = (steps, list(launched))
    for running in [r for r in channel.running if r.lane >= 0]:
        error = channel.departures.lost_after(running.lane, running.number)
        if error is not None:
            channel.abandon([running], error)


def _coordinator_gone(channel: Channel) -> None:
    channel.departures.coordinator_gone = True
    for request in channel.member.waiting.values():
        cancel(channel, request)
        request.fail(channel.departures.without_coordinator(request))
    channel.member.waiting.clear()
