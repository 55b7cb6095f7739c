"""Hooks of gradients, in whatever thread of autograd they come."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from mpiddp.optimizer.callers import caller


class Owner:
    """In place of a reducer: notes whether another thread's hook could come in meanwhile."""

    def __init__(self) -> None:
        self.turn = threading.RLock()
        self.came: list[int] = []

    def gradient_came(self, index: int) -> None:
        def another() -> None:
            if not self.turn.acquire(blocking=False):
                self.came.append(index)

        thread = threading.Thread(target=another)
        thread.start()
        thread.join()


def test_one_at_a_time_and_none_when_the_owner_is_gone() -> None:
    """Autograd has a thread for each device."""
    owner = Owner()
    this: Any = weakref.ref(owner)
    hook = caller(this, 7, "gradient_came")
    hook()
    assert owner.came == [7] and owner.turn.acquire(blocking=False)
    del owner
    hook()
