"""How far ``mpiddp plan`` is off: its predictions of all-reduces beside measured ones, between several hosts.

    python benchmarks/plan.py [--only 2x1] [--mbit 1000] [--delay-us 0]

The hosts are namespaces of this machine, as in hosts.py. On each layout of ranks over hosts the figures are measured as
``mpiddp plan`` does, then all-reduces as buckets of gradients have them. Predicted are these, from the layout's own
figures, and, for more than two hosts, from those of the first two, measured while every other two measure theirs: what
the command is for, on a machine whose cores have as much to do as with all hosts in one world.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARK = "RESULT "

#: Hosts and ranks on each.
LAYOUTS = ((2, 1), (4, 1), (8, 1), (2, 2), (4, 2))

#: Bytes, how many all-reduces follow one another, and how often.
SIZES = ((32 << 20, 1, 7), (1 << 20, 1, 60), (4 << 10, 32, 60))
TIMEOUT_S = 120


def measured_here(with_sizes: bool) -> tuple[dict[str, Any], list[float]]:
    """Between the ranks of the world as it is: the figures, and the seconds of an all-reduce of each size."""
    import torch

    from mpiddp import runtime
    from mpiddp.cli.plan.measure import Meter, measure

    here = runtime.current()
    comm = here.world.comm.Dup()
    meter, segment = Meter(here, comm), here.config.segment_kb << 10
    figures = asdict(measure(meter, torch.float32, segment))
    sizes = SIZES if with_sizes else ()
    measured = [meter.allreduce(torch.ones(nbytes // 4), segment, *often) for nbytes, *often in sizes]
    comm.Free()
    return figures, measured


def worker(per_host: int) -> None:
    """On the hosts: among all; then among every two of them, all of these at once, so that the cores have as much to
    do as before."""
    import torch

    import mpiddp

    torch.set_num_threads(1)
    mpiddp.init()
    from mpi4py import MPI

    everyone, two = MPI.COMM_WORLD, 2 * per_host
    figures, measured = measured_here(True)
    found = {"figures": figures, "measured": measured, "of_two": None}
    if everyone.size > two:
        mpiddp.shutdown()
        first = everyone.rank // two * two
        mpiddp.init(comm=list(range(first, first + two)))
        everyone.Barrier()
        found["of_two"] = measured_here(False)[0]
        everyone.Barrier()
    if everyone.rank == 0:
        print(MARK + json.dumps(found), flush=True)


def run_on(hosts: int, per_host: int, mbit: float, delay_us: float) -> dict[str, Any]:
    from tests.harness.launcher import find
    from tests.hosts.hosts import Hosts

    launcher = find()
    assert launcher is not None, "no mpirun beside this Python or on PATH"
    with Hosts(hosts, mbit or None, delay_us) as these:
        done = these.start(launcher, [__file__, "--worker", str(per_host)], per_host).wait(TIMEOUT_S)
    result = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
    if result is None:
        raise SystemExit(f"{hosts} hosts x {per_host}: no result\n{done}")
    found: dict[str, Any] = json.loads(result.removeprefix(MARK))
    return found


def figures_of(values: dict[str, Any]) -> Any:
    from mpiddp.cli.plan.model import Figures, Wire

    values = dict(values)
    for name in ("network", "within"):
        values[name] = Wire(**values[name])
    return Figures(**values)


def show(hosts: int, per_host: int, found: dict[str, Any]) -> None:
    from mpiddp.cli.plan.model import allreduce

    own = figures_of(found["figures"])
    of_two = figures_of(found["of_two"]) if found["of_two"] else None
    wire = own.network
    print(
        f"\n{hosts} hosts x {per_host}: latency {wire.short_s * 1e6:.0f} us, {wire.long_s * 1e6:.0f} us for long "
        f"messages, {8e-9 * per_host / wire.byte_s:.3f} Gbit/s"
    )
    for (nbytes, *_), seconds in zip(SIZES, found["measured"], strict=True):
        size = f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"
        name, predicted = allreduce(hosts, nbytes, own)
        said = f"  {size:>7}  {name:12}  measured {seconds * 1e3:8.2f} ms"
        said += f"  predicted {predicted * 1e3:8.2f} ms, error {100 * (predicted / seconds - 1):+6.1f} %"
        if of_two is not None:
            predicted = allreduce(hosts, nbytes, of_two)[1]
            said += f"  from 2 hosts' figures {predicted * 1e3:8.2f} ms, {100 * (predicted / seconds - 1):+6.1f} %"
        print(said)
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="HxR", help="a layout: hosts x ranks on each, such as 4x2")
    parser.add_argument("--mbit", type=float, default=1000, help="of each link, 0 for unshaped (default 1000)")
    parser.add_argument("--delay-us", type=float, default=0, help="from host to host")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.worker:
        worker(arguments.worker)
        return
    for hosts, per_host in LAYOUTS:
        if not arguments.only or f"{hosts}x{per_host}" in arguments.only:
            show(hosts, per_host, run_on(hosts, per_host, arguments.mbit, arguments.delay_us))


if __name__ == "__main__":
    main()
