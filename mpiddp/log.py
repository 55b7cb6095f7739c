"""The library's logger: records carry the rank and the host; INFO and below come from rank 0 alone."""

from __future__ import annotations

import logging
import socket

__all__ = ["bind", "configure", "logger"]

logger = logging.getLogger("mpiddp")

_FORMAT = "%(asctime)s %(name)s [rank %(rank)s on %(host)s] %(levelname)s %(message)s"


class _RankFilter(logging.Filter):
    """Adds ``rank`` and ``host`` to each record; lets a rank other than 0 say warnings and worse only."""

    def __init__(self) -> None:
        super().__init__()
        self.rank: int | None = None
        self.host = socket.gethostname()

    def filter(self, record: logging.LogRecord) -> bool:
        record.rank = "-" if self.rank is None else self.rank
        record.host = self.host
        return record.levelno > logging.INFO or record.levelno <= logging.DEBUG or self.rank in (None, 0)


_filter = _RankFilter()
logger.addFilter(_filter)


def bind(rank: int | None, host: str) -> None:
    """From now on records say that they come from ``rank`` on ``host``."""
    _filter.rank = rank
    _filter.host = host


def configure(level: str) -> None:
    """Set the level; give the logger a handler of its own only where the application has configured none."""
    logger.setLevel(level)
    if not logger.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(_FORMAT, "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
