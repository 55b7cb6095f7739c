"""The engine: requests become exchanges, and whoever has time pushes them."""

from .at_once import follow_at_once, meet_at_once
from .channel import Channel
from .lane import Lane
from .meet import may_meet
from .presence import Presence
from .progress import Engine
from .prompt import learn
from .request import Handle, Key, Kind, Request, Signature

__all__ = [
    "Channel",
    "Engine",
    "Handle",
    "Key",
    "Kind",
    "Lane",
    "Presence",
    "Request",
    "Signature",
    "follow_at_once",
    "learn",
    "may_meet",
    "meet_at_once",
]
