"""A GPU for each rank of a node. Pure, and the same on all of them."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["choose", "sharing"]


def choose(visible: Sequence[Sequence[str]]) -> list[int | None]:
    """For each rank the index of its GPU among those that it sees; None where it sees none.

    ``visible[r]`` are the UUIDs that local rank r sees, in its order. No GPU gets a second rank while one that could
    have been used has none (a maximum matching, by augmenting paths: Kuhn 1955). Where all see all it is the local
    rank, modulo the number of GPUs; where each sees one of its own, 0.
    """
    owners: dict[str, list[int]] = {}
    for rank, uuids in enumerate(visible):
        load = 1
        while uuids and not _give(rank, visible, owners, load, set()):
            load += 1
    chosen = {rank: uuid for uuid, ranks in owners.items() for rank in ranks}
    return [list(uuids).index(chosen[rank]) if uuids else None for rank, uuids in enumerate(visible)]


def _give(
    rank: int, visible: Sequence[Sequence[str]], owners: dict[str, list[int]], load: int, tried: set[str]
) -> bool:
    """Find a GPU with fewer than ``load`` ranks, moving others where that helps. A free one goes before any move."""
    for uuid in visible[rank]:
        if len(owners.setdefault(uuid, [])) < load:
            owners[uuid].append(rank)
            return True
    for uuid in visible[rank]:
        if uuid in tried:
            continue
        tried.add(uuid)
        for other in owners[uuid]:
            if _give(other, visible, owners, load, tried):
                owners[uuid].remove(other)
                owners[uuid].append(rank)
                return True
    return False


def sharing(visible: Sequence[Sequence[str]], chosen: Sequence[int | None]) -> dict[str, list[int]]:
    """The GPUs that several local ranks have got, and those ranks."""
    users: dict[str, list[int]] = {}
    for rank, index in enumerate(chosen):
        if index is not None:
            users.setdefault(visible[rank][index], []).append(rank)
    return {uuid: ranks for uuid, ranks in users.items() if len(ranks) > 1}
