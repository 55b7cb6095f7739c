"""Training steps between hosts with buckets of several sizes, beside the size that the optimizer chooses by itself.

    python benchmarks/buckets.py [--only NAME] [--seconds 20]

The hosts are namespaces of this machine, as in hosts.py; the optimizers take turns, step by step. Times are medians on
the rank where they are largest.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
MARK = "RESULT "
SIZES_MIB = (1, 2, 4, 8, 25)


@dataclass(frozen=True)
class Case:
    """Links of so many Mbit/s (0: unshaped) and delay from host to host; layers of ``width`` x ``width``."""

    name: str
    hosts: int
    mbit: float
    delay_us: float
    layers: int
    batch: int
    width: int = 512

    @property
    def title(self) -> str:
        rate = f"{self.mbit:g} Mbit/s" if self.mbit else "unshaped"
        delay = f", {2 * self.delay_us / 1000:g} ms round trip" if self.delay_us else ""
        millions = self.layers * self.width**2 / 1e6
        return f"{self.hosts} hosts, {rate}{delay}, {millions:.1f} million parameters, {self.batch} samples"


CASES = (
    Case("near", 2, 1000, 0, 32, 8),
    Case("far", 2, 1000, 150, 32, 8),
    Case("slow", 2, 100, 2500, 8, 8),
    Case("unshaped", 2, 0, 0, 32, 8),
    Case("four", 4, 1000, 150, 32, 8),
    Case("busy", 2, 1000, 0, 32, 1024),
)


def worker(order: str) -> None:
    """On the hosts."""
    import torch
    from hosts import in_turn
    from torch import nn

    import mpiddp

    network_of = importlib.import_module("mpiddp.optimizer.network").network_of
    distributed: Any = importlib.import_module("mpiddp.optimizer.distributed")
    spec = json.loads(order)
    case = Case(**spec["case"])
    torch.set_num_threads(1)
    mpiddp.init()
    from mpi4py import MPI

    inputs = torch.randn(case.batch, case.width)
    options, chosen = distributed.Options, dict[str, str]()

    def trained(name: str, **fixed: Any) -> Callable[[], object]:
        model = nn.Sequential(*(nn.Linear(case.width, case.width) for _ in range(case.layers)))
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-6)
        if name != "local":
            with mock.patch.object(distributed, "Options", lambda **kwargs: options(**{**kwargs, **fixed})):
                optimizer = mpiddp.DistributedOptimizer(optimizer, model.named_parameters())

        def step() -> None:
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()

        step()
        if name == "chosen":
            reducer = optimizer._mpiddp_reducer
            network = network_of(reducer.engine, reducer.lane, ())
            chosen["is"] = f"{reducer._options.bucket_nbytes / 2**20:.1f} MiB chosen, {network!r}"
        return step

    runs = {f"{mib} MiB": trained(f"{mib}", bucket_nbytes=mib << 20, nodes=()) for mib in SIZES_MIB}
    runs = {"chosen": trained("chosen"), **runs, "local": trained("local")}
    found = in_turn(runs, spec["seconds"], MPI.COMM_WORLD)
    if mpiddp.rank() == 0:
        print(MARK + json.dumps({"times": {name: each["time"] for name, each in found.items()}, **chosen}), flush=True)


def run(case: Case, seconds: float) -> None:
    from tests.harness.launcher import find
    from tests.hosts.hosts import Hosts

    launcher = find()
    assert launcher is not None, "no mpirun beside this Python or on PATH"
    order = json.dumps({"case": asdict(case), "seconds": seconds})
    with Hosts(case.hosts, case.mbit or None, case.delay_us) as hosts:
        done = hosts.start(launcher, [__file__, "--worker", order]).wait(seconds * 3 + 60)
    result = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
    if result is None:
        raise SystemExit(f"{case.title}: no result\n{done}")
    found = json.loads(result.removeprefix(MARK))
    print(f"\n{case.title}: {found['is']}")
    print("  " + "".join(f"{name:>10}" for name in found["times"]))
    print("  " + "".join(f"{1e3 * each:7.1f} ms" for each in found["times"].values()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[case.name for case in CASES], action="append", help="this case")
    parser.add_argument("--seconds", type=float, default=20, help="for each case")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.worker:
        worker(arguments.worker)
        return
    for case in CASES:
        if not arguments.only or case.name in arguments.only:
            run(case, arguments.seconds)


if __name__ == "__main__":
    main()
