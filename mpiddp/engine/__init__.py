"""The engine: requests become exchanges, and whoever has time pushes them."""

from .progress import Channel, Engine
from .request import Handle, Kind, Request

__all__ = ["Channel", "Engine", "Handle", "Kind", "Request"]
