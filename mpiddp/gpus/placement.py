"""Which GPU is whose, agreed by the ranks of a node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..log import logger
from .choose import choose, sharing
from .visible import Gpu, Seen

__all__ = ["Placement", "place"]


@dataclass(frozen=True)
class Placement:
    """This rank's GPU: ``index`` is its number in this process (``cuda:index``), None where it has none.

    ``users`` are the local ranks that have the same one, this one included.
    """

    index: int | None
    seen: Seen
    users: tuple[int, ...] = ()

    @property
    def gpu(self) -> Gpu | None:
        """What the GPU is."""
        return None if self.index is None else self.seen.gpus[self.index]


def place(node_comm: Any, seen: Seen) -> Placement:
    """Agree with the other ranks of the node, those of ``node_comm``; the first says who shares. Collective."""
    visible: list[list[str]] = node_comm.allgather([gpu.uuid for gpu in seen.gpus])
    chosen = choose(visible)
    shared = sharing(visible, chosen)
    if shared and node_comm.rank == 0:
        said = "; ".join(f"local ranks {', '.join(map(str, r))} have GPU-{uuid}" for uuid, r in shared.items())
        logger.warning("on this node ranks share a GPU, and take turns on it: %s", said)
    own = chosen[node_comm.rank]
    users = shared.get(visible[node_comm.rank][own], [node_comm.rank]) if own is not None else []
    return Placement(own, seen, tuple(users))
