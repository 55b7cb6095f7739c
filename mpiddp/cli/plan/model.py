"""What exchanges take, by formulas. Pure: figures in, seconds out.

Hockney's model: a message of n bytes takes alpha + n beta. R. Hockney, The communication challenge for MPP, Parallel
Computing 20(3), 1994. The sums over an algorithm's steps follow R. Thakur, R. Rabenseifner and W. Gropp, Optimization
of collective communication operations in MPICH, IJHPCA 19(1), 2005, whose gamma is the time to add a byte.

Two things are added. alpha is one of two, since MPI sends short messages at once and asks before it sends long ones.
And the ring cuts chunks into segments: from two segments a chunk on, the latency of one is hidden behind the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...collectives import hierarchical, ring, select

__all__ = [
    "Figures",
    "Wire",
    "allreduce",
    "buckets",
    "calibrated",
    "doubling_s",
    "exposed_s",
    "hierarchical_s",
    "ring_s",
]

#: Up to here MPI sends without asking (Open MPI's default over TCP).
SHORT_NBYTES = 64 << 10

#: Of a local step, the part that is backward: it does two multiplications where forward does one.
BACKWARD = 2 / 3


@dataclass(frozen=True)
class Wire:
    """Alphas in seconds, beta in seconds a byte, while every rank sends and receives at the same time."""

    short_s: float
    long_s: float
    byte_s: float

    def message_s(self, nbytes: float) -> float:
        """One message from a rank to its peer, and one back."""
        return (self.short_s if nbytes <= SHORT_NBYTES else self.long_s) + nbytes * self.byte_s


@dataclass(frozen=True)
class Figures:
    """What was measured, with ``local_size`` ranks on each node.

    ``network`` is between nodes, all of a node's ranks at once; ``within`` between ranks of one node, by MPI.
    ``node_alpha_s`` and ``node_byte_s``: an all-reduce through a node's memory; ``add_byte_s``: gamma.
    """

    local_size: int
    network: Wire
    within: Wire
    node_alpha_s: float
    node_byte_s: float
    add_byte_s: float
    segment_nbytes: int

    def node_s(self, nbytes: float) -> float:
        """An all-reduce among the ranks of one node; nothing for one rank."""
        return self.node_alpha_s + nbytes * self.node_byte_s if self.local_size > 1 else 0.0


def ring_s(size: int, nbytes: float, wire: Wire, add_byte_s: float, segment_nbytes: int) -> float:
    """2(p-1) steps of n/p bytes each, of which half are added: 2(p-1) alpha + 2(p-1)/p n beta + (p-1)/p n gamma.

    A chunk of several segments costs no alpha a step while the network carries the rest of it; what remains is that of
    the last one, which nothing hides.
    """
    if size == 1:
        return 0.0
    chunk = nbytes / size
    segments = ring.segments_of(chunk, segment_nbytes)
    one = wire.message_s(chunk / segments)
    step, last = max(chunk * wire.byte_s, one), 0.0
    if segments > 1:
        last = one - chunk / segments * wire.byte_s
    return 2 * (size - 1) * step + last + (size - 1) * chunk * add_byte_s


def doubling_s(nodes: int, nbytes: float, figures: Figures) -> float:
    """log2(p) steps of n bytes, each added; two more where p is no power of two. Steps within a node cost less."""
    local, size = figures.local_size, nodes * figures.local_size
    power = 1 << (size.bit_length() - 1)
    folded, seconds, distance = size - power, 0.0, 1
    while distance < power:
        is_local = not folded and local % (2 * distance) == 0
        wire = figures.within if is_local else figures.network
        seconds += wire.message_s(nbytes) + nbytes * figures.add_byte_s
        distance *= 2
    if folded:
        fold = figures.within if local % 2 == 0 else figures.network
        seconds += 2 * fold.message_s(nbytes) + nbytes * figures.add_byte_s
    return seconds


def calibrated(nodes: int, nbytes: float, seconds: float, figures: Figures) -> Figures:
    """``figures`` with the latency of short messages by which ``doubling_s`` is what was measured on so many nodes.

    A step of doubling takes longer than a message between a pair of ranks: each waits for the latest of all before it.
    """

    def with_latency(short_s: float) -> Figures:
        return replace(figures, network=replace(figures.network, short_s=short_s))

    rest = doubling_s(nodes, nbytes, with_latency(0.0))
    steps = doubling_s(nodes, nbytes, with_latency(1.0)) - rest
    return with_latency(max(0.0, seconds - rest) / steps)


def hierarchical_s(nodes: int, nbytes: float, figures: Figures) -> float:
    """A ring between nodes for each local rank, all at once, of a node's l-th part of the bytes.

    In parts: the network carries one while the memory works on another, so that the slower of the two counts, and half
    an all-reduce of the memory before it and behind it.
    """
    count = max(1, -(-int(nbytes) // hierarchical.PART_NBYTES))
    part = nbytes / count
    network = ring_s(nodes, part / figures.local_size, figures.network, figures.add_byte_s, figures.segment_nbytes)
    memory = figures.node_s(part)
    return memory + network + (count - 1) * max(memory, network)


def allreduce(nodes: int, nbytes: int, figures: Figures, wanted: str = "") -> tuple[str, float]:
    """The algorithm that :mod:`~mpiddp.collectives.select` takes on so many nodes, and the seconds that it takes."""
    name = select.allreduce_by(nbytes, nodes == 1, wanted, nodes > 1 and figures.local_size > 1)
    if nodes == 1:
        return name, figures.node_s(nbytes)  # by whatever was measured there
    if name == "doubling":
        return name, doubling_s(nodes, nbytes, figures)
    if name == select.HIERARCHICAL:
        return name, hierarchical_s(nodes, nbytes, figures)
    # One ring through all ranks has one stream on each node's link, where the figure is for all local ranks' streams.
    # The ordered reduction sends the bytes of every one of them.
    wire, local = figures.network, figures.local_size
    wire = wire if name == select.ORDERED else Wire(wire.short_s, wire.long_s, wire.byte_s / local)
    return name, ring_s(nodes * local, nbytes, wire, figures.add_byte_s, figures.segment_nbytes)


def buckets(nbytes: int, first_nbytes: int, bucket_nbytes: int) -> list[int]:
    """The sizes of the buckets that gradients of so many bytes fill, the first one smaller, in bytes."""
    sizes: list[int] = []
    left = nbytes
    while left > 0:
        sizes.append(min(left, bucket_nbytes if sizes else min(first_nbytes, bucket_nbytes)))
        left -= sizes[-1]
    return sizes


def exposed_s(sizes: Sequence[int], seconds: Sequence[float], backward_s: float) -> float:
    """What of the exchange is left when backward ends: gradients come evenly, and buckets leave in order when full."""
    total, filled, done = sum(sizes), 0, 0.0
    for nbytes, each in zip(sizes, seconds, strict=True):
        filled += nbytes
        done = max(done, backward_s * filled / total) + each
    return max(0.0, done - backward_s)
