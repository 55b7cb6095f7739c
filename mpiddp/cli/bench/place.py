"""Where the benchmark runs: the ranks, the threads that each of them gets, and the lines that say so."""

from __future__ import annotations

import platform
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ... import binding, runtime
from ...version import __version__
from ...world import library_name

__all__ = ["Place", "arrive", "cache_nbytes", "complain", "cpu_model", "leave", "say"]


@dataclass(frozen=True)
class Place:
    """The ranks that take part; ``comm`` is the benchmark's own communicator, on which it agrees and waits."""

    rank: int
    size: int
    comm: Any


def say(text: str) -> None:
    """Write a line, on rank 0."""
    if runtime.rank() == 0:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def complain(text: str) -> None:
    """Write a line that says what is wrong, on rank 0."""
    if runtime.rank() == 0:
        sys.stderr.write(f"mpiddp bench: error: {text}\n")


def arrive() -> Place:
    """Start the library, give each rank its share of the node's cores, and write the header. Collective."""
    torch.set_num_threads(1)  # init() warns of too many threads; how many fit is known once the ranks are counted
    runtime.init()
    world = runtime.current().world
    threads = _threads(world.local_size)
    torch.set_num_threads(threads)
    place = Place(world.rank, world.size, world.comm.Dup())
    for line in _header(world, threads):
        say(line)
    return place


def leave(place: Place) -> None:
    """Give back what :func:`arrive` has made. Collective."""
    place.comm.Free()
    runtime.shutdown()


def _threads(local_size: int) -> int:
    """A rank's share of its node's cores, of those that it is bound to; at least one."""
    facts = binding.facts()
    cores = min(facts.cores(facts.usable), facts.quota_cpus or len(facts.usable))
    return max(1, min(cores // local_size, facts.cores(facts.affinity)))


def _header(world: Any, threads: int) -> list[str]:
    import mpi4py

    facts = binding.facts()
    ranks = sorted(set(Counter(world.nodes).values()))
    return [
        f"# mpiddp {__version__}, torch {torch.__version__}, mpi4py {mpi4py.__version__}, "
        f"Python {platform.python_version()}, {library_name()}, thread level {world.thread_level}",
        f"# {world.size} rank(s) on {len(set(world.nodes))} node(s), {' or '.join(map(str, ranks))} on each; "
        f"{threads} thread(s) a rank; rank 0 on {world.host}",
        f"# {cpu_model()}, {facts.cores(facts.usable)} core(s) usable on rank 0's node",
    ]


def cache_nbytes(caches: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """The size of the largest cache of the first core, in bytes; a large one's where the kernel does not tell."""
    sizes = [path.read_text().strip() for path in caches.glob("index*/size")]
    return max((int(text.removesuffix("K")) << 10 for text in sizes if text.endswith("K")), default=64 << 20)


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What the processor calls itself; at least its architecture."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() == "model name"]
    return names[0] if names and names[0] else platform.processor() or platform.machine()
