"""The process sets that exist. State: ``_sets``, by id; changed by all ranks together, in the thread that calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import config
from .config import Config
from .engine import Channel, Engine, Kind, Request, Signature
from .errors import ArgumentError
from .memory import NodeMemory
from .process_set import ProcessSet, global_process_set
from .transport.among import Among
from .transport.base import Levels
from .transport.device import CUDA_AWARE
from .transport.host import HostLink
from .transport.mailbox import control_port
from .transport.node import Node
from .world import World

__all__ = ["ProcessSets", "open_channel"]


def open_channel(comm: Any, ranks: Sequence[int], world: World, settings: Config, memory: NodeMemory) -> Channel:
    """A channel among world ranks, whose communicator is ``comm``. Collective over them."""
    here = world.nodes[world.rank]
    node_comm: Any = comm.Split(here, comm.rank)
    on_node = [rank for rank in range(world.size) if world.nodes[rank] == here]
    node = Node.over(node_comm, [on_node.index(rank) for rank in ranks if rank in on_node], memory)
    port = control_port(comm, node_comm)
    node_comm.Free()
    link = HostLink(comm, "ordered" if settings.deterministic else settings.algorithm)
    if settings.cuda_aware:
        link.ways.way_to = lambda _: CUDA_AWARE
    # NCCL for the world's alone: kernels of two communicators, enqueued in different orders, could wait for each other.
    has_nccl = settings.local == "nccl" and len(ranks) == world.size
    _lay_out(link, [world.nodes[rank] for rank in ranks], node, has_nccl)
    return Channel(
        link,
        port,
        ranks,
        int(settings.fusion_mb * config.MIB),
        settings.segment_kb << 10,
    )


def _lay_out(link: HostLink, nodes: Sequence[int], node: Node | None, has_nccl: bool) -> None:
    """Say how the members lie on ``nodes``; ``node`` is the memory of those on this one. ``has_nccl``: they are to use
    NCCL if they can."""
    by_node: dict[int, list[int]] = {}
    for member, number in enumerate(nodes):
        by_node.setdefault(number, []).append(member)
    local = by_node[nodes[link.rank]]
    if len(by_node) == 1:
        link.node = node
        link.ways.wants_nccl = has_nccl and link.size > 1 and link.algorithm == ""
        link.ways.can_map = link.size > 1 and link.algorithm in ("", "shared_memory", "ordered")
    elif len(local) > 1 and all(len(members) == len(local) for members in by_node.values()):
        place = local.index(link.rank)
        within = Among(link, local, node)
        within.ways.can_map = link.algorithm in ("", "hierarchical")
        within.ways.wants_nccl = has_nccl and within.ways.can_map
        link.levels = Levels(within, Among(link, [members[place] for members in by_node.values()]))


class ProcessSets:
    """Adds and removes process sets; the world's own has id 0."""

    def __init__(self, world: World, settings: Config, engine: Engine, channel: Channel, memory: NodeMemory) -> None:
        self._world, self._settings, self._engine, self._memory = world, settings, engine, memory
        self._everyone = channel
        self._sets: dict[int, ProcessSet] = {0: global_process_set}
        self._comms: dict[int, Any] = {}
        self._next = 1
        self._agreements = 0
        global_process_set.ranks = list(range(world.size))
        global_process_set.process_set_id = 0
        global_process_set.channel = channel

    def add(self, process_set: ProcessSet | Sequence[int]) -> ProcessSet:
        """Make a set usable. Collective over all ranks, in one order; raises on all where they disagree."""
        if not isinstance(process_set, ProcessSet):
            process_set = ProcessSet(process_set)
        if process_set.process_set_id is not None:
            raise ArgumentError(f"{process_set!r} has been added already")
        ranks = process_set.ranks
        wrong = [rank for rank in ranks if rank >= self._world.size]
        if wrong or not ranks:
            raise ArgumentError(
                f"process set {ranks}: ranks are 0 to {self._world.size - 1}" + (f"; {wrong} are not" if wrong else "")
            )
        for other in self._sets.values():
            if other.ranks == ranks:
                raise ArgumentError(f"a process set with ranks {ranks} exists already: {other!r}")
        self._agree(f"add process set {ranks}")
        process_set.process_set_id = self._next
        self._next += 1
        self._sets[process_set.process_set_id] = process_set
        if self._world.rank in ranks:
            self._open(process_set)
        return process_set

    def _open(self, process_set: ProcessSet) -> None:
        number, ranks = process_set.process_set_id, process_set.ranks
        assert number is not None
        # Collective over the members alone; the tag keeps sets apart that are made at the same time.
        comm = self._world.comm.Create_group(self._world.comm.group.Incl(ranks), tag=number % 32768)
        channel = open_channel(comm, ranks, self._world, self._settings, self._memory)
        channel.link.ways.devices.own = self._everyone.link.ways.devices.own
        process_set.channel = channel
        self._comms[number] = comm
        self._engine.add(channel)

    def remove(self, process_set: ProcessSet) -> bool:
        """Forget a set. Collective over all ranks. False if it is the world's own, or was not added."""
        number = process_set.process_set_id
        if not number or self._sets.get(number) is not process_set:
            return False
        channel = process_set.channel
        if channel is not None and channel.pending:
            raise ArgumentError(f"{process_set!r} has operations in flight: synchronize them before removing it")
        self._agree(f"remove process set {process_set.ranks}")
        self._close(process_set, free=True)
        return True

    def _close(self, process_set: ProcessSet, free: bool) -> None:
        number = process_set.process_set_id
        assert number is not None
        if process_set.channel is not None:
            self._engine.remove(
                process_set.channel, f"{process_set!r} has been removed: what was made for it cannot be used any more"
            )
        comm = self._comms.pop(number, None)
        if comm is not None and free:
            comm.Free()
        del self._sets[number]
        process_set.process_set_id = process_set.channel = None

    def forget(self, free: bool) -> None:
        """All sets end with the world."""
        for number in sorted(self._sets, reverse=True):
            self._close(self._sets[number], free)

    def _agree(self, what: str) -> None:
        """A barrier whose name says what is to be done, so that ranks which differ get an error in place of a hang."""
        nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._agreements += 1
        signature = Signature(int(Kind.BARRIER), purpose=what)
        request = Request(f"process sets, change {self._agreements}", signature, nothing, eager=True)
        self._engine.wait(self._engine.submit(self._everyone, request))
