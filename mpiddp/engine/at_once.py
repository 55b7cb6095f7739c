"""What is waited for at once, and for which the members may meet, is begun where it is submitted, if nothing else is in
flight; where the others are there already it is done when it has been submitted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..uncompiled import uncompiled
from .meet import meet
from .prompt import Recipe, ending
from .request import Request
from .running import Running

if TYPE_CHECKING:
    from .channel import Channel
    from .progress import Engine

__all__ = ["follow_at_once", "meet_at_once"]

#: Looks for the others before one waits for them as for anything else.
_PATIENCE = 4


@uncompiled
def meet_at_once(engine: Engine, channel: Channel, request: Request) -> Request:
    """``request``, submitted."""
    if not engine.begins_alone():
        return engine.submit(channel, request)
    request.where = channel.where
    try:
        is_begun = meet(channel, request, _PATIENCE)
    finally:
        now = engine.ends()
    return _begun(engine, channel, request, is_begun, now)


@uncompiled
def follow_at_once(
    engine: Engine, channel: Channel, recipe: Recipe, tensor: torch.Tensor, answer: Any
) -> Request | None:
    """A request for a contiguous tensor like those that ``recipe`` is for, submitted; None: it is done."""
    channel.unnamed = key = channel.unnamed + 1
    if not engine.begins_alone():
        return engine.submit(channel, recipe.request(key, tensor, answer))
    request, is_begun = None, False
    try:
        done = channel.may_meet() and recipe.follow(key, tensor)
        if done is not True:
            request = recipe.request(key, tensor, answer)
            request.where = channel.where
            if done is False:
                is_begun = meet(channel, request, _PATIENCE)
            else:
                channel.running.append(Running([request], ending(channel, request, done)))
                is_begun = True
    finally:
        now = engine.ends()
    if request is not None:
        return _begun(engine, channel, request, is_begun, now)
    channel.completed += 1
    engine.presence.submitted(key, recipe.signature.kind, now)
    engine.after_push()
    return None


def _begun(engine: Engine, channel: Channel, request: Request, is_begun: bool, now: float) -> Request:
    """After the push in which ``request`` should have been begun."""
    if not is_begun:
        return engine.submit(channel, request)
    engine.goes_on(request, now)
    engine.after_push()
    return request
