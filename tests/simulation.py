"""N ranks in one thread: their exchanges are resumed in an order drawn from a seed, over a network in memory.

Messages of one pair and tag arrive in order; everything else is delayed at random. A send completes only after it has
been received (as a rendezvous does), and reads its buffer at that moment, so that a buffer that is changed too early
is noticed. The same seed replays the same schedule.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable, Sequence

import torch

from mpiddp.transport.base import Pending, Steps, nothing_to_move


class Deadlock(AssertionError):
    """Nobody can go on."""


class Network:
    """The mailboxes between the ranks; counts what is sent."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        self.random = random.Random(seed)
        self.sends: dict[tuple[int, int, int], deque[_Transfer]] = defaultdict(deque)
        self.recvs: dict[tuple[int, int, int], deque[_Transfer]] = defaultdict(deque)
        self.sent_elements = [0] * size
        self.sent_messages = [0] * size

    def links(self) -> list[SimulatedLink]:
        return [SimulatedLink(self, rank) for rank in range(self.size)]

    def deliver(self) -> bool:
        """Complete one transfer for which both sides are there, at random; False if there is none."""
        ready = [key for key, queue in self.sends.items() if queue and self.recvs[key]]
        if not ready:
            return False
        key = self.random.choice(ready)
        source, target = self.sends[key].popleft(), self.recvs[key].popleft()
        assert source.piece.dtype == target.piece.dtype
        assert source.piece.numel() == target.piece.numel(), f"{key}: {source.piece.numel()} != {target.piece.numel()}"
        target.piece.copy_(source.piece)
        source.done = target.done = True
        return True

    def idle(self) -> bool:
        return not any(self.sends.values()) and not any(self.recvs.values())


class _Transfer:
    def __init__(self, piece: torch.Tensor) -> None:
        self.piece = piece
        self.done = False

    def test(self) -> bool:
        return self.done


class SimulatedRegion:
    def __init__(self, network: Network, rank: int, flat: torch.Tensor) -> None:
        assert flat.dim() == 1 and flat.is_contiguous()
        self.network, self.rank, self.flat = network, rank, flat

    def send(self, lo: int, hi: int, peer: int, tag: int) -> Pending:
        assert 0 <= lo <= hi <= self.flat.numel() and peer != self.rank
        if lo == hi:
            return nothing_to_move
        self.network.sent_elements[self.rank] += hi - lo
        self.network.sent_messages[self.rank] += 1
        transfer = _Transfer(self.flat[lo:hi])
        self.network.sends[self.rank, peer, tag].append(transfer)
        return transfer.test

    def recv(self, lo: int, hi: int, peer: int, tag: int) -> Pending:
        assert 0 <= lo <= hi <= self.flat.numel() and peer != self.rank
        if lo == hi:
            return nothing_to_move
        transfer = _Transfer(self.flat[lo:hi])
        self.network.recvs[peer, self.rank, tag].append(transfer)
        return transfer.test


class SimulatedLink:
    def __init__(self, network: Network, rank: int) -> None:
        self.network, self.rank, self.size = network, rank, network.size

    def open(self, flat: torch.Tensor) -> SimulatedRegion:
        return SimulatedRegion(self.network, self.rank, flat)


def run(network: Network, exchanges: Sequence[Steps]) -> None:
    """Resume the exchanges, and deliver messages, in random order until all have ended."""
    alive = dict(enumerate(exchanges))
    idle_rounds = 0
    while alive:
        progressed = network.random.random() < 0.7 and network.deliver()
        rank = network.random.choice(list(alive))
        try:
            next(alive[rank])
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
