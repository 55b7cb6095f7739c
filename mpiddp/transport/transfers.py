"""Transfers of device memory, which reach MPI only when an event says so, and yet in the order in which they were asked
for: messages of one pair and tag are told apart by their order alone."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from .base import Pending

__all__ = ["Queue", "Queues", "Transfer"]


class Transfer(Protocol):
    """One message. Each of these is asked again until it says True, and then never more."""

    def prepare(self) -> bool:
        """Begin what may run ahead of its turn: a copy to the host. Only so many transfers of a queue are prepared."""
        ...

    def post(self) -> bool:
        """Hand it to MPI, once what it sends, or where it is received, is ready."""
        ...

    def complete(self) -> bool:
        """Whether it has arrived, or left."""
        ...


class Queue:
    """The transfers with one peer in one direction. ``most``: so many at once hold what :meth:`Transfer.prepare`
    takes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._asked: deque[Transfer] = deque()
        self._prepared: deque[Transfer] = deque()
        self._posted: deque[Transfer] = deque()
        self.asked = self.completed = 0

    def add(self, transfer: Transfer) -> int:
        """A further transfer; its number, from 1."""
        self._asked.append(transfer)
        self.asked += 1
        return self.asked

    def push(self) -> None:
        """Move each transfer as far as it can go."""
        while self._posted and self._posted[0].complete():
            self._posted.popleft()
            self.completed += 1
        while self._asked and len(self._prepared) + len(self._posted) < self._most and self._asked[0].prepare():
            self._prepared.append(self._asked.popleft())
        while self._prepared and self._prepared[0].post():
            self._posted.append(self._prepared.popleft())


class Queues:
    """All of one exchange. Whoever tests a transfer pushes all of them, so that none waits for its turn to be
    tested."""

    def __init__(self) -> None:
        self._queues: dict[tuple[int, bool], Queue] = {}

    def add(self, peer: int, is_send: bool, transfers: list[Transfer], most: int) -> Pending:
        """The parts of one transfer; the answer says whether the last of them is complete."""
        queue = self._queues.get((peer, is_send))
        if queue is None:
            queue = self._queues[peer, is_send] = Queue(most)
        last = 0
        for transfer in transfers:
            last = queue.add(transfer)
        queue.push()

        def test() -> bool:
            if queue.completed < last:
                self._push()
            return queue.completed >= last

        return test

    def _push(self) -> None:
        for queue in self._queues.values():
            queue.push()
