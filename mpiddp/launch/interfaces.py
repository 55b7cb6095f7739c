"""The network interfaces of this host, and those among them that MPI must not use.

Container and virtual machine software gives every host a bridge of the same name with the same address (docker0:
172.17.0.1). Open MPI takes it for a way from host to host, and the job hangs at its first message. What a host leaves
out concerns no other: each publishes its own addresses, and is looked for at those.
"""

from __future__ import annotations

import fcntl
import re
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Interface", "interfaces", "leading_nowhere", "suspects"]

#: Bridges, and interfaces for services, that lead to no other host, as their software names them.
_LOCAL = re.compile(
    r"docker0|docker_gwbridge|br-[0-9a-f]{12}|virbr\d+|(lxc|lxd|incus)br\d+|podman\d+|cni\d+|cni-podman\d+|cbr\d+"
    r"|nerdctl\d+|kube-ipvs\d+|nodelocaldns|vboxnet\d+|vmnet\d+|idrac"
)
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Interface:
    """One that has an IPv4 address. ``is_bridge``: the kernel says that it is a bridge."""

    name: str
    address: str
    is_bridge: bool = False

    @property
    def is_loopback(self) -> bool:
        """Whether it leads to this host only, by definition."""
        return self.address.startswith("127.")

    def __str__(self) -> str:
        return f"{self.name} ({self.address})"


def interfaces(sysfs: Path = Path("/sys/class/net")) -> list[Interface]:
    """Those of this host that have an IPv4 address; Open MPI uses no other."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it has none
            found.append(Interface(name, socket.inet_ntoa(answer[20:24]), (sysfs / name / "bridge").is_dir()))
    return found


def leading_nowhere(found: Iterable[Interface]) -> list[str]:
    """The names of those that lead to no other host, as far as names tell; none where nothing else would be left."""
    others = [each for each in found if not each.is_loopback]
    local = [each.name for each in others if _LOCAL.fullmatch(each.name)]
    return local if len(local) < len(others) else []


def suspects(found: Sequence[Interface], tables: Iterable[Path] = (Path("/proc/net/tcp"),)) -> list[Interface]:
    """Those that may be why a peer is not reached: bridges, and those at whose own address a peer was looked for."""
    looked_for = {remote for table in tables if table.is_file() for remote in _remotes(table.read_text())}
    return [
        each
        for each in found
        if not each.is_loopback and (each.is_bridge or each.address in looked_for or _LOCAL.fullmatch(each.name))
    ]


def _remotes(table: str) -> Iterable[str]:
    """The addresses at the other ends of the connections in ``/proc/net/tcp``, whatever has become of them."""
    for line in table.splitlines()[1:]:
        address = line.split()[2].partition(":")[0]
        yield socket.inet_ntoa(struct.pack("=I", int(address, 16)))
