"""Between the nodes: addresses that several hosts have, fast networks that lie idle, slow pairs."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from ipaddress import ip_address, ip_network

from ....launch import Interface, name_network
from ..facts import Facts, Job
from ..finding import Finding, note, warning

__all__ = ["CHECKS"]

#: A pair is slow below this share of the median of its kind. Links of one network differ by less.
_SLOW = 1 / 3


def addresses_are_unique(job: Job) -> Iterator[Finding]:
    """docker0, virbr0: the same address on several hosts, on which each would talk to itself."""
    owners: dict[tuple[str, str], set[int]] = {}
    for each in job.ranks:
        for interface in each.machine.interfaces if not each.tcp_included else ():
            if _is_excluded(interface, each.tcp_excluded):
                continue
            owners.setdefault((interface.name, interface.address), set()).add(each.node)
    nodes_of: dict[str, set[int]] = {}
    names: dict[str, set[str]] = {}
    for (name, address), nodes in owners.items():
        nodes_of.setdefault(address, set()).update(nodes)
        names.setdefault(address, set()).add(name)
    shared = {address: nodes for address, nodes in nodes_of.items() if len(nodes) > 1 and not _one_host(job, nodes)}
    if shared:
        cure = ",".join(["lo", *sorted({name for address in shared for name in names[address]})])
        said = ", ".join(f"{a} ({'/'.join(sorted(names[a]))}) on {len(n)} nodes" for a, n in sorted(shared.items()))
        yield warning(
            "same-address",
            f"several hosts have the same address: {said}; MPI may take it for a way between them and hang",
            f"`mpirun --mca btl_tcp_if_exclude {cure}`; for UCX, UCX_NET_DEVICES=<the one that joins the hosts>"
            if job.is_open_mpi
            else f"name what joins the hosts, {name_network(job.ranks[0].library, 'eth0')}",
        )


def _is_excluded(interface: Interface, excluded: str) -> bool:
    """Whether Open MPI's list, of names and networks such as ``lo,172.17.0.0/16``, has it."""
    for item in excluded.split(","):
        if item.strip() == interface.name:
            return True
        try:
            if ip_address(interface.address) in ip_network(item.strip(), strict=False):
                return True
        except ValueError:
            continue  # a name
    return False


def _one_host(job: Job, nodes: set[int]) -> bool:
    """Containers on one host's network are several nodes to MPI, and share all addresses by right."""
    hosts = {each.host for each in job.ranks if each.node in nodes}
    return len(hosts) == 1


def fabric_is_used(job: Job) -> Iterator[Finding]:
    """A fast network in /sys, and MPI on another one."""
    nodes = job.nodes()
    if len(nodes) < 2:
        return
    found: dict[tuple[str, str], list[Facts]] = {}
    for ranks in nodes.values():
        for kind in sorted({fabric.kind for fabric in ranks[0].machine.fabrics if fabric.is_active}):
            why = _unused(kind, ranks[0])
            if why:
                found.setdefault((kind, why), []).append(ranks[0])
    for (kind, why), firsts in found.items():
        layer = "ucx" if kind in ("InfiniBand", "RoCE") else "cm"
        hosts = ", ".join(sorted({each.host for each in firsts})[:4])
        yield warning(
            "fabric-unused",
            f"{kind} is there and active ({hosts}), and MPI does not use it: {why}",
            f"use the site's MPI, which is built for it, and no MPI wheel; or `mpirun --mca pml {layer}`"
            + ("; install libibverbs (rdma-core)" if not firsts[0].machine.has_verbs else ""),
        )


def _unused(kind: str, each: Facts) -> str:
    """Why this rank's MPI does not use that fabric; empty if it does, or cannot be known."""
    if each.pml == "ob1":
        return f"{each.library} talks TCP (layer ob1)"
    if each.pml == "ucx" and kind in ("InfiniBand", "RoCE") and not each.has_ucx_ib:
        return "UCX has not loaded its InfiniBand transport" + (
            ", libibverbs is missing" if not each.machine.has_verbs else ""
        )
    if each.pml == "ucx" and kind in ("Omni-Path", "Slingshot"):
        return "UCX has no transport for it"
    return ""


def pairs_are_alike(job: Job) -> Iterator[Finding]:
    """A pair much slower than the others that go the same way."""
    ways: dict[str, list[tuple[float, tuple[int, int]]]] = {}
    for pair in job.pairs:
        if pair.gigabytes_per_s is not None:
            ways.setdefault(pair.way, []).append((pair.gigabytes_per_s, pair.ranks))
    for way, measured in ways.items():
        median = statistics.median(rate for rate, _ in measured)
        slow = [(rate, ranks) for rate, ranks in measured if rate < _SLOW * median]
        if slow:
            said = ", ".join(f"{a} and {b}: {rate:.2g}" for rate, (a, b) in slow[:6])
            hosts = sorted({job.ranks[rank].host for _, ranks in slow for rank in ranks})
            yield warning(
                "slow-pair",
                f"some pairs are slow by {way}, in GB/s: {said}; the median is {median:.2g}",
                f"look at the links and the load of {', '.join(hosts[:6])}, and at where the ranks are bound",
            )


def ranks_outnumber_pairs(job: Job) -> Iterator[Finding]:
    """Some pairs were not measured."""
    size = len(job.ranks)
    if job.pairs and len(job.pairs) < size * (size - 1) // 2:
        yield note(
            "pairs-left-out",
            f"{len(job.pairs)} of {size * (size - 1) // 2} pairs were measured: each rank with its node's first, "
            "and these in a ring",
        )


CHECKS = (addresses_are_unique, fabric_is_used, pairs_are_alike, ranks_outnumber_pairs)
