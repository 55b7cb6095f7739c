"""What a host tells of itself: limits, shared memory, network interfaces, fabrics. Linux; elsewhere it tells less."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ...launch import Interface, interfaces

__all__ = ["Fabric", "Machine", "fabrics", "look"]

_LIMITS = ("NOFILE", "NPROC", "MEMLOCK", "AS", "STACK")


@dataclass(frozen=True)
class Fabric:
    """A fast network's device; ``kind`` is InfiniBand, RoCE, Omni-Path or Slingshot."""

    kind: str
    device: str
    is_active: bool = True


@dataclass(frozen=True)
class Machine:
    """One host as one rank sees it. Sizes in bytes; a limit of None is none; of /dev/shm None: there is no such."""

    limits: dict[str, int | None]
    interfaces: tuple[Interface, ...] = ()
    fabrics: tuple[Fabric, ...] = ()
    has_verbs: bool = False
    shm_nbytes: int | None = None
    shm_free_nbytes: int | None = None
    has_gpu_files: bool = False


def look() -> Machine:
    """This host, now."""
    total, free = _space("/dev/shm")
    return Machine(
        limits=_limits(),
        interfaces=tuple(each for each in interfaces() if not each.is_loopback),
        fabrics=fabrics(),
        has_verbs=_loads("libibverbs.so.1"),
        shm_nbytes=total,
        shm_free_nbytes=free,
        has_gpu_files=Path("/dev/nvidiactl").exists(),
    )


def _limits() -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    for name in _LIMITS:
        soft, _ = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
        found[name] = None if soft == resource.RLIM_INFINITY else soft
    return found


def _space(path: str) -> tuple[int | None, int | None]:
    try:
        found = os.statvfs(path)
    except OSError:
        return None, None
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def fabrics(sys_class: Path = Path("/sys/class")) -> tuple[Fabric, ...]:
    """What /sys knows: InfiniBand's list, which RoCE and Omni-Path are in too, and Slingshot's own."""
    found = [Fabric("Slingshot", path.name) for path in _listed(sys_class / "cxi")]
    for device in _listed(sys_class / "infiniband"):
        ports = list(_listed(device / "ports"))
        layers = {_text(port / "link_layer") for port in ports}
        is_active = any("ACTIVE" in _text(port / "state") for port in ports)
        kind = "Omni-Path" if device.name.startswith("hfi1") else "RoCE" if layers == {"Ethernet"} else "InfiniBand"
        found.append(Fabric(kind, device.name, is_active))
    return tuple(found)


def _listed(folder: Path) -> Iterable[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
