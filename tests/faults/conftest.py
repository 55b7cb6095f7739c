"""Fixtures of tests on ranks that leave each other alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture
def begin(world: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """``begin(STALL_WARN_S=1)``: ``mpiddp`` anew with these settings, until the test ends and all ranks shut down."""

    def anew(**settings: object) -> Any:
        world.shutdown()
        for name, value in settings.items():
            monkeypatch.setenv(f"MPIDDP_{name}", str(value))
        world.init()
        return world

    yield anew
    world.shutdown()
