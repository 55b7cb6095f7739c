"""Facts of jobs, as mpiddp doctor gathers them; tests change what they are about."""

from __future__ import annotations

import dataclasses
from typing import Any

from mpiddp.binding import NodeFacts
from mpiddp.cli.doctor.facts import Facts, Job
from mpiddp.cli.doctor.machine import Interface, Machine
from mpiddp.gpus import Gpu, Placement, Seen
from mpiddp.launch import Launch

__all__ = ["changed", "gpu_rank", "job", "rank"]

LIMITS: dict[str, int | None] = {"NOFILE": 1024, "NPROC": None, "MEMLOCK": None, "AS": None, "STACK": 8 << 20}


def machine(node: int, **changes: Any) -> Machine:
    """A host with one address of its own and 8 GiB of /dev/shm."""
    plain = Machine(dict(LIMITS), (Interface("eth0", f"10.0.0.{node + 1}"),), (), True, 8 << 30, 8 << 30)
    return dataclasses.replace(plain, **changes)


def rank(number: int, size: int, per_node: int, **changes: Any) -> Facts:
    """A rank of a job in which all is well: two cores each, two threads."""
    node, local = divmod(number, per_node)
    own = frozenset({2 * local, 2 * local + 1})
    usable = frozenset(range(2 * per_node))
    facts = Facts(
        rank=number,
        size=size,
        host=f"n{node}",
        machine=machine(node),
        launch=Launch("open mpi", number, size, local, per_node),
        cpus=NodeFacts(own, usable, {cpu: str(cpu) for cpu in usable}, 2),
        versions={"mpiddp": "1.0", "torch": "2.13.0", "Python": "3.11.7", "MPI": "Open MPI v5.0.11"},
        node=node,
        local_rank=local,
        library="Open MPI v5.0.11",
        libmpi="/opt/ompi/lib/libmpi.so.40",
        launcher_exe="/opt/ompi/bin/prterun",
        thread_level="multiple",
        pml="ob1",
        memory="memory files",
    )
    return dataclasses.replace(facts, **changes)


def job(size: int = 4, per_node: int = 2, **changes: Any) -> Job:
    """All ranks with the same changes."""
    return Job(tuple(rank(number, size, per_node, **changes) for number in range(size)))


def changed(of: Job, number: int, **changes: Any) -> Job:
    """The same job with another rank ``number``; changes of ``machine`` are given as ``machine={...}``."""
    ranks = list(of.ranks)
    if "machine" in changes:
        changes["machine"] = dataclasses.replace(ranks[number].machine, **changes["machine"])
    ranks[number] = dataclasses.replace(ranks[number], **changes)
    return dataclasses.replace(of, ranks=tuple(ranks))


def gpu_rank(index: int | None, *uuids: str, peers: tuple[int, ...] = (), why: str = "") -> Placement:
    """A rank that sees these GPUs and has the one of that number."""
    return Placement(index, Seen(tuple(Gpu(uuid, "H200", 139 << 30, "", peers) for uuid in uuids), why))
