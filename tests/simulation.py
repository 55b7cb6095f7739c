"""N ranks in one thread: their exchanges are resumed in an order drawn from a seed, over a network in memory.

Messages of one pair and tag arrive in order; everything else is delayed at random. A send completes only after it has
been received (as a rendezvous does), and reads its buffer at that moment, so that a buffer that is changed too early
is noticed; a network that buffers completes it at once, so that a rank may run ahead of its peers. The same seed
replays the same schedule.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable, Sequence

import torch

from mpiddp.transport.base import Levels, Pending, Steps, nothing_to_move
from mpiddp.transport.node import Node

_Key = tuple[int, int, int, int]  # group of links, source and target within it, tag


class Deadlock(AssertionError):
    """Nobody can go on."""


class Network:
    """The mailboxes between the ranks; counts what is sent."""

    def __init__(self, size: int, seed: int = 0, is_buffering: bool = False) -> None:
        self.size = size
        self.random = random.Random(seed)
        self.is_buffering = is_buffering
        self.sends: dict[_Key, deque[_Transfer]] = defaultdict(deque)
        self.recvs: dict[_Key, deque[_Transfer]] = defaultdict(deque)
        self.sent_elements = [0] * size
        self.sent_messages = [0] * size
        self._groups: list[tuple[int, ...]] = []
        self._matched: list[_Key] = []
        self.on_match: Callable[[_Key], None] = self._matched.append  # for each pair of a send and its receive

    def links(self, ranks: Sequence[int] | None = None) -> list[SimulatedLink]:
        """Links among ``ranks``, or all, whose messages are apart from those of any other links."""
        members = tuple(range(self.size) if ranks is None else ranks)
        self._groups.append(members)
        return [SimulatedLink(self, rank, members, len(self._groups) - 1) for rank in range(len(members))]

    def post_send(self, key: _Key, transfer: _Transfer) -> None:
        if self.is_buffering:
            transfer.piece, transfer.done = transfer.piece.clone(), True
        queue = self.sends[key]
        queue.append(transfer)
        if len(self.recvs[key]) >= len(queue):
            self.on_match(key)

    def post_recv(self, key: _Key, transfer: _Transfer) -> None:
        queue = self.recvs[key]
        queue.append(transfer)
        if len(self.sends[key]) >= len(queue):
            self.on_match(key)

    def deliver(self) -> bool:
        """Complete one transfer for which both sides are there, at random; False if there is none."""
        matched = self._matched
        if not matched:
            return False
        index = int(self.random.random() * len(matched))
        key, matched[index] = matched[index], matched[-1]
        matched.pop()
        self.complete(key)
        return True

    def complete(self, key: _Key) -> tuple[int, int]:
        """Complete the oldest transfer of ``key``, for which both sides are there; from whom it came to whom."""
        source, target = self.sends[key].popleft(), self.recvs[key].popleft()
        assert source.piece.dtype == target.piece.dtype
        assert source.piece.numel() == target.piece.numel(), f"{key}: {source.piece.numel()} != {target.piece.numel()}"
        target.piece.copy_(source.piece)
        source.done = target.done = True
        members = self._groups[key[0]]
        return members[key[1]], members[key[2]]

    def idle(self) -> bool:
        return not any(self.sends.values()) and not any(self.recvs.values())


class _Transfer:
    def __init__(self, piece: torch.Tensor) -> None:
        self.piece = piece
        self.done = False

    def test(self) -> bool:
        return self.done


class SimulatedRegion:
    def __init__(self, link: SimulatedLink, flat: torch.Tensor) -> None:
        assert flat.dim() == 1 and flat.is_contiguous()
        self.link, self.flat = link, flat

    def send(self, lo: int, hi: int, peer: int, tag: int) -> Pending:
        link = self.link
        assert 0 <= lo <= hi <= self.flat.numel() and peer != link.rank
        if lo == hi:
            return nothing_to_move
        rank = link.members[link.rank]
        link.network.sent_elements[rank] += hi - lo
        link.network.sent_messages[rank] += 1
        transfer = _Transfer(self.flat[lo:hi])
        link.network.post_send((link.group, link.rank, peer, tag), transfer)
        return transfer.test

    def recv(self, lo: int, hi: int, peer: int, tag: int) -> Pending:
        link = self.link
        assert 0 <= lo <= hi <= self.flat.numel() and peer != link.rank
        if lo == hi:
            return nothing_to_move
        transfer = _Transfer(self.flat[lo:hi])
        link.network.post_recv((link.group, peer, link.rank, tag), transfer)
        return transfer.test


class SimulatedLink:
    def __init__(self, network: Network, rank: int, members: tuple[int, ...], group: int) -> None:
        self.network, self.rank, self.size = network, rank, len(members)
        self.members, self.group = members, group
        self.node: Node | None = None
        self.gpus = self.nccl = None
        self.algorithm = ""
        self.levels: Levels | None = None

    def open(self, flat: torch.Tensor) -> SimulatedRegion:
        return SimulatedRegion(self, flat)


def run(network: Network, exchanges: Sequence[Steps]) -> None:
    """Resume the exchanges, and deliver messages, in random order until all have ended."""
    alive = dict(enumerate(exchanges))
    marks: dict[int, object] = {}
    idle_rounds = 0
    while alive:
        progressed = network.random.random() < 0.7 and network.deliver()
        rank = network.random.choice(list(alive))
        try:
            mark = next(alive[rank])
            progressed |= mark != marks.get(rank)
            marks[rank] = mark
        except StopIteration:
            del alive[rank]
            progressed = True
        idle_rounds = 0 if progressed else idle_rounds + 1
        if idle_rounds > 200 + 50 * network.size and not network.deliver():
            raise Deadlock(f"ranks {sorted(alive)} wait for ever")


def on_all(size: int, exchange: Callable[[SimulatedLink], Steps], seed: int = 0) -> Network:
    """Run one exchange on every rank of a new network; it must leave no message behind."""
    network = Network(size, seed)
    run(network, [exchange(link) for link in network.links()])
    assert network.idle(), "messages were left behind"
    return network
