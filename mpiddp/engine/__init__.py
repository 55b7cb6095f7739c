"""The engine: requests become exchanges, and whoever has time pushes them."""

from .channel import Channel
from .lane import Lane
from .meet import may_meet
from .presence import Presence
from .progress import Engine
from .request import Handle, Key, Kind, Request, Signature

__all__ = ["Channel", "Engine", "Handle", "Key", "Kind", "Lane", "Presence", "Request", "Signature", "may_meet"]
