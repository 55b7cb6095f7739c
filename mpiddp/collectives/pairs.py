"""Messages between neighbours on different nodes, by which the network is measured: both directions of every node's
link are busy, and all of a node's ranks share it, as in the algorithms."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..transport.base import Link, Steps

__all__ = ["exchange", "neighbours"]


def neighbours(nodes: Sequence[int], rank: int, within: bool, turn: int = 0) -> tuple[int | None, int | None]:
    """To whom ``rank`` sends and from whom it receives: the rank of its place on another node; in pairs, or where the
    number of nodes is odd in a ring. With an odd ``turn`` in the other pairs of neighbours: so no pair runs ahead.

    ``within``: another rank of its own node. None where there is no such rank.
    """
    members: dict[int, list[int]] = {}
    for each, node in enumerate(nodes):
        members.setdefault(node, []).append(each)
    own = members[nodes[rank]]
    place = own.index(rank)
    ring = own if within else [of_node[place] for _, of_node in sorted(members.items()) if place < len(of_node)]
    if len(ring) == 1:
        return None, None
    at = ring.index(rank)
    if len(ring) % 2 == 0:
        partner = ring[at ^ 1 if turn % 2 == 0 else (((at + 1) ^ 1) - 1) % len(ring)]
        return partner, partner
    return ring[(at + 1) % len(ring)], ring[at - 1]


def exchange(
    link: Link, source: torch.Tensor, target: torch.Tensor, peers: tuple[int | None, int | None], piece: int, tag: int
) -> Steps:
    """``source`` to the first of ``peers`` and ``target``, as long, from the second, in pieces of so many elements."""
    out, back = peers
    sent, received = link.open(source), link.open(target)
    pieces = [(lo, min(source.numel(), lo + piece)) for lo in range(0, source.numel(), piece)]
    transfers = [received.recv(lo, hi, back, tag) for lo, hi in pieces] if back is not None else []
    transfers += [sent.send(lo, hi, out, tag) for lo, hi in pieces] if out is not None else []
    for number, pending in enumerate(transfers):
        while not pending():
            yield number
