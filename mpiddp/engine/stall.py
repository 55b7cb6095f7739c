"""Who is missing, when something has waited for too long.

Three things can be seen to wait. What the coordinator has heard of from some members and not from others: it knows who
is missing, reports it, and tells the members that it has. What a member has announced to a coordinator that is silent
about it. An exchange that has begun and does not move. For the last two the page of the node tells more, and of
several ranks on a node that wait for the same thing the lowest one speaks.

State: belongs to whoever holds the engine's lock, in which :meth:`StallCheck._look` runs; reports are made outside.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import StallError
from ..log import logger
from . import missing
from .presence import Presence
from .request import Key, Kind, shown_number
from .wire import NEWS

if TYPE_CHECKING:
    from .channel import Channel
    from .progress import Engine

__all__ = ["Stall", "StallCheck"]

#: Bounds on the time between two looks, in seconds.
_OFTEN_S, _SELDOM_S = 0.05, 1.0
#: A coordinator of which nothing is heard may hear of a request, and look, this much later, in seconds.
_HEARING_S = 2.0
#: What still waits is reported again when it has waited this many times longer.
_AGAIN = 4.0
#: So many names are told to the members, and shown in a report.
_MOST_TOLD, _MOST_SHOWN = 256, 5


@dataclass
class Stall:
    """Something that waits for too long. ``absent`` are known to be missing; None where the page has to tell."""

    channel: Channel
    key: Any
    names: list[str]
    waited_s: float
    waiting: list[int]
    absent: list[int] | None
    is_announced: bool = True
    lane: int = -1
    number: int = 0
    in_world: bool = True
    give_up: Callable[[str], None] | None = None

    def what(self) -> str:
        """The operations in words."""
        shown = ", ".join(self.names[:_MOST_SHOWN])
        more = len(self.names) - _MOST_SHOWN
        return shown + (f" and {more} more" if more > 0 else "")


class StallCheck:
    """Looks at the engine's channels at intervals; ``warn_s`` and ``abort_s`` as in the settings, 0 for never."""

    def __init__(self, engine: Engine, presence: Presence, warn_s: float, abort_s: float) -> None:
        self._engine, self._presence = engine, presence
        self._warn_s, self._abort_s = warn_s or math.inf, abort_s or math.inf
        self._first_s = min(self._warn_s, self._abort_s)
        self._interval_s = min(max(self._first_s / 4, _OFTEN_S), _SELDOM_S)
        self.next_look_s = time.monotonic() + self._interval_s if self._first_s < math.inf else math.inf
        self._ages: dict[Any, tuple[Any, float]] = {}
        self._said: dict[Any, float] = {}
        self._told: dict[Any, float] = {}

    def watch(self, channel: Channel) -> None:
        """Hear what the coordinator of a new channel says, or be heard."""
        channel.news["stalled"] = lambda keys: self._told.update({(channel.ranks, key): math.inf for key in keys})
        if channel.coordinator is not None:
            coordinator = channel.coordinator
            coordinator.news["give up"] = lambda member, keys, text: coordinator.give_up(keys, text)

    @contextmanager
    def patient(self) -> Iterator[None]:
        """While the body runs this rank does not give up: who is missing is known to be at work. It still reports."""
        abort_s, self._abort_s = self._abort_s, math.inf
        try:
            yield
        finally:
            self._abort_s = abort_s

    def check(self, now: float) -> None:
        """Look, and report what has waited too long. Called where nothing is pushed, by whoever has time."""
        found = self._engine.inspect(lambda: list(self._look(now)))
        for stall in found or ():
            stall.in_world = stall.channel is self._engine.channels[0]
            text = missing.report(stall, self._presence, now)
            if stall.give_up is None:
                logger.warning("%s", text)
                continue
            logger.error("%s", text)
            self._engine.alone(partial(stall.give_up, text))

    # -- under the engine's lock ---------------------------------------------------------------------------------------

    def _look(self, now: float) -> Iterator[Stall]:
        if now < self.next_look_s:
            return  # another thread has looked just now
        self.next_look_s = now + self._interval_s
        ages, self._ages = self._ages, {}
        flagged = reported = 0
        for channel in self._engine.channels:
            for stall, is_ours in self._stalls(channel, ages, now):
                if not is_ours:
                    fingerprint = zlib.crc32(repr((channel.ranks, stall.names[0], stall.number)).encode()) + 1
                    flagged = flagged or fingerprint
                    if stall.waited_s < self._first_s:
                        continue
                    others = [seen for rank in stall.waiting if (seen := self._presence.see(rank)) is not None]
                    stall.waiting = sorted(seen.rank for seen in others if seen.stalled == fingerprint)
                    spoken = [seen.rank for seen in others if seen.reported == fingerprint]
                    # Whoever waits has had an interval to flag it.
                    if stall.give_up is None and (spoken or stall.waiting)[:1] != [self._presence.rank]:
                        continue
                    reported = fingerprint
                if self._is_due(stall):
                    yield stall
        self._presence.stalled(flagged, reported)
        self._said = {key: said for key, said in self._said.items() if key in self._ages}
        self._told = {key: told for key, told in self._told.items() if key in self._ages}

    def _is_due(self, stall: Stall) -> bool:
        if stall.give_up is None and stall.waited_s < max(self._warn_s, _AGAIN * self._said.get(stall.key, 0.0)):
            return False
        self._said[stall.key] = stall.waited_s
        return True

    def _age(self, key: Any, mark: Any, ages: dict[Any, tuple[Any, float]], now: float) -> float:
        """For how long ``key`` has been there with ``mark``, as far as the looks can tell."""
        before = ages.get(key)
        self._ages[key] = before if before is not None and before[0] == mark else (mark, now)
        return now - self._ages[key][1]

    def _stalls(self, channel: Channel, ages: dict[Any, tuple[Any, float]], now: float) -> Iterator[tuple[Stall, bool]]:
        """What waits in ``channel``, and whether it is certain that this rank has to report it."""
        if channel.coordinator is not None:
            for stall in self._announced(channel, ages, now):
                yield stall, True
        else:
            for stall in self._unheard(channel, ages, now):
                yield stall, False
        for stall in self._unmoved(channel, ages, now):
            yield stall, False

    def _announced(self, channel: Channel, ages: dict[Any, tuple[Any, float]], now: float) -> Iterator[Stall]:
        """On the coordinator: what some members have submitted and others not, one stall for all with the same."""
        coordinator = channel.coordinator
        assert coordinator is not None
        activity = coordinator.heard, channel.completed, sum(lane.launched for lane in channel.lanes)
        quiet_s = self._age((channel.ranks, None), activity, ages, now)
        found: dict[tuple[int, ...], Stall] = {}
        keys: dict[tuple[int, ...], list[Any]] = {}
        for key, record in coordinator.announced.items():
            kind = Kind(record.signature.kind)
            waited_s = now - record.since_s
            if kind is Kind.JOIN:
                waited_s = min(waited_s, quiet_s)  # others have data left; that takes its time
            if waited_s < self._first_s / 2:
                continue
            waiting = [channel.ranks[member] for member in sorted(record.numbers)]
            there = record.numbers.keys() if kind is Kind.JOIN else record.numbers.keys() | coordinator.joined
            absent = tuple(rank for member, rank in enumerate(channel.ranks) if member not in there)
            keys.setdefault(absent, []).append(key)
            if absent in found:
                found[absent].names.append(_shown(kind, key))
            else:
                age_key = channel.ranks, absent, key
                self._age(age_key, None, ages, now)
                names = [_shown(kind, key)]
                found[absent] = Stall(channel, age_key, names, waited_s, waiting, list(absent))
        for absent, stall in found.items():
            if stall.waited_s >= self._first_s:
                channel.tell_coordinator(NEWS, "stalled", keys[absent][:_MOST_TOLD])
            overdue = [key for key in keys[absent] if now - coordinator.announced[key].since_s >= self._abort_s]
            if overdue and stall.waited_s >= self._abort_s:
                stall.give_up = partial(_tell_to_give_up, channel, overdue)
            yield stall

    def _unheard(self, channel: Channel, ages: dict[Any, tuple[Any, float]], now: float) -> Iterator[Stall]:
        """On the other members: what the coordinator has said nothing of, although it is time."""
        late = []
        too_late_s = self._abort_s + 4 * self._interval_s + _HEARING_S  # the coordinator would have given up by now
        for request in channel.member.waiting.values():
            if request.done or request.signature.kind == Kind.JOIN:
                continue
            key = channel.ranks, request.key
            waited_s = self._age(key, id(request), ages, now)
            first_s = self._first_s if key not in self._told else too_late_s
            if waited_s >= first_s:
                late.append((waited_s, request))
        if not late:
            return
        waited_s, first = late[0]
        names = [_shown(Kind(request.signature.kind), request.key) for _, request in late]
        stall = Stall(
            channel, (channel.ranks, first.key), names, waited_s, list(channel.ranks), None, is_announced=False
        )
        if waited_s >= too_late_s:
            stall.give_up = lambda text: _fail([request for _, request in late], text)
        reported_s = self._first_s + 2 * self._interval_s + _HEARING_S  # by now, by a coordinator that has heard of it
        if waited_s >= reported_s:
            yield stall

    def _unmoved(self, channel: Channel, ages: dict[Any, tuple[Any, float]], now: float) -> Iterator[Stall]:
        """What is under way and does not move: the first of these; the others may just wait for it."""
        stuck = []
        for running in channel.running:
            if not running.is_begun:
                continue  # it is announced, too
            waited_s = self._age(id(running), running.mark, ages, now)
            stuck.append((waited_s, running))
        if not stuck or stuck[0][0] < self._first_s - self._interval_s:
            return
        waited_s, first = stuck[0]
        name = f"the exchange of {first.handles[0].name!r}" if first.handles else "an exchange of others, joined,"
        if first.lane >= 0:
            name = f"the gradients of a DistributedOptimizer ({first.handles[0].name})"
        stall = Stall(
            channel, id(first), [name], waited_s, list(channel.ranks), None, lane=first.lane, number=first.number
        )
        if waited_s >= self._abort_s:
            late = [running for waited_s, running in stuck if waited_s >= self._abort_s]
            stall.give_up = lambda text: channel.abandon(late, StallError(text))
        yield stall


def _tell_to_give_up(channel: Channel, keys: list[Any], text: str) -> None:
    channel.tell_coordinator(NEWS, "give up", keys, text)


def _shown(kind: Kind, key: Key) -> str:
    if kind is Kind.JOIN:
        return "join"
    name = kind.name.lower()
    return f"{name} {key!r}" if isinstance(key, str) else f"unnamed {name} number {shown_number(key)}"


def _fail(requests: Sequence[Any], text: str) -> None:
    """They stay announced: if the others come after all, this rank takes part, and nobody else suffers."""
    for request in requests:
        if not request.done:
            request.fail(StallError(text))
