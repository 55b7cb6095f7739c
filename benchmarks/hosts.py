"""All-reduces between several hosts, beside torch.distributed's gloo and the MPI library's own, in one run.

    python benchmarks/hosts.py [--only NAME] [--seconds 8]

The hosts are namespaces of this machine (tests/hosts): real TCP over links of a chosen rate and delay, and one
machine's cores for all. So it needs root, or user namespaces, and Open MPI 5. The contenders take turns, call by call;
times are medians on the rank where they are largest. "ideal" is what 2(p-1)/p of the tensor's bytes take at the link's
rate, and CPU what all threads of all ranks use, in seconds per GB of tensor and rank.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARK = "RESULT "

#: Short calls follow one another for about so long before the next contender's turn.
BLOCK_S = 0.05


#: What is trained where a case is no all-reduce.
MODELS = {"steps": "8.4 million parameters", "powersgd": "25.2 million parameters, PowerSGD of rank 4"}


@dataclass(frozen=True)
class Case:
    """``hosts`` x ``per_host`` ranks; links of so many Mbit/s (0: unshaped) and delay from host to host."""

    name: str
    hosts: int
    per_host: int
    mbit: float
    delay_us: float
    nbytes: int
    kind: str = "allreduce"

    @property
    def ideal_s(self) -> float:
        """What the bytes that must cross a host's link take."""
        return 2 * (self.hosts - 1) / self.hosts * self.nbytes * 8 / (self.mbit * 1e6) if self.mbit else 0.0

    @property
    def title(self) -> str:
        """One line that says it all."""
        rate = f"{self.mbit:g} Mbit/s" if self.mbit else "unshaped"
        delay = f", {2 * self.delay_us / 1000:g} ms round trip" if self.delay_us else ""
        size = f"{self.nbytes >> 20} MiB" if self.nbytes >= 1 << 20 else f"{self.nbytes >> 10} KiB"
        if self.kind in MODELS:
            size = f"training steps, {MODELS[self.kind]}"
        return f"{self.hosts} hosts x {self.per_host}, {rate}{delay}, {size}"


MIB = 1 << 20
CASES = (
    Case("two", 2, 1, 1000, 0, 32 * MIB),
    Case("four", 4, 1, 1000, 0, 32 * MIB),
    Case("layered", 2, 2, 1000, 0, 32 * MIB),
    Case("small", 4, 1, 1000, 150, 4 << 10),
    Case("unshaped", 2, 1, 0, 0, 32 * MIB),
    Case("near", 2, 1, 1000, 50, 32 * MIB),
    Case("far", 2, 1, 1000, 500, 32 * MIB),
    Case("farther", 2, 1, 1000, 2500, 32 * MIB),
    Case("steps", 2, 1, 1000, 0, 0, "steps"),
    Case("powersgd", 2, 1, 1000, 0, 0, "powersgd"),
)


# -- on the hosts ------------------------------------------------------------------------------------------------------


def in_turn(runs: dict[str, Callable[[], object]], seconds: float, comm: Any) -> dict[str, dict[str, float]]:
    """The median time of a call of each, the largest over the ranks, and the CPU seconds of a call, all ranks' mean."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    used: dict[str, float] = dict.fromkeys(runs, 0.0)
    calls = dict.fromkeys(runs, 0)
    began, number = time.perf_counter(), -2
    while comm.allreduce(time.perf_counter() - began, max_op()) < seconds or number < 5:
        number += 1
        for name, run in runs.items():
            several = int(BLOCK_S / times[name][-1]) if times[name] else 1
            for _ in range(comm.bcast(max(1, min(50, several)), 0)):
                cpu, start = time.process_time(), time.perf_counter()
                run()
                took, cpu = time.perf_counter() - start, time.process_time() - cpu
                if number >= 0:
                    times[name].append(took)
                    used[name] += cpu
                    calls[name] += 1
    return {
        name: {
            "time": comm.allreduce(statistics.median(times[name]), max_op()),
            "cpu": comm.allreduce(used[name] / calls[name]) / comm.size,
        }
        for name in runs
    }


def max_op() -> Any:
    from mpi4py import MPI

    return MPI.MAX


def open_gloo(comm: Any) -> Any:
    import torch.distributed as dist

    store = dist.TCPStore(socket.gethostname(), 0, comm.size, True, wait_for_workers=False) if comm.rank == 0 else None
    host, port = comm.bcast((store.host, store.port) if store else None, 0)
    store = store or dist.TCPStore(host, port, comm.size, False)
    dist.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)
    return dist


def allreduce(case: Case, seconds: float, comm: Any) -> dict[str, dict[str, float]]:
    import torch
    from mpi4py import MPI

    import mpiddp

    dist = open_gloo(comm)
    tensors = [torch.ones(case.nbytes // 4) for _ in range(3)]
    array = tensors[2].numpy()
    runs: dict[str, Callable[[], object]] = {
        "mpiddp": lambda: mpiddp.allreduce_(tensors[0]),
        "gloo": lambda: dist.all_reduce(tensors[1]),
        "MPI_Allreduce": lambda: comm.Allreduce(MPI.IN_PLACE, array),
    }
    if case.nbytes < MIB:
        one = bytearray(1)
        pair = comm.Split(comm.rank // 2, comm.rank)

        def round_trip() -> None:
            for turn in range(2):
                if pair.rank == turn:
                    pair.Send(one, 1 - turn)
                else:
                    pair.Recv(one, 1 - pair.rank)

        runs["round trip"] = round_trip
    return in_turn(runs, seconds, comm)


def steps(case: Case, seconds: float, comm: Any) -> dict[str, dict[str, float]]:
    """Training steps of a model whose exchange takes much longer than its computation."""
    import torch
    from torch import nn

    import mpiddp

    inputs = torch.randn(8, 1024)

    def trained(compression: Any = None) -> Callable[[], object]:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        if compression is not None:
            optimizer = mpiddp.DistributedOptimizer(optimizer, model.named_parameters(), compression=compression)

        def step() -> None:
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()

        return step

    runs = {
        "float32": trained(mpiddp.Compression.none),
        "bf16": trained(mpiddp.Compression.bf16),
        "not exchanged": trained(),
    }
    return in_turn(runs, seconds, comm)


def powersgd(case: Case, seconds: float, comm: Any) -> dict[str, dict[str, float]]:
    """Training steps with both sides' PowerSGD of rank 4, once it has started; and with nothing exchanged."""
    import torch
    from torch import nn
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    import mpiddp

    dist = open_gloo(comm)
    inputs, targets = torch.randn(32, 2048), torch.randint(10, (32,))

    def trained(way: str) -> Callable[[], object]:
        torch.manual_seed(0)
        hidden = [layer for _ in range(6) for layer in (nn.Linear(2048, 2048), nn.ReLU())]
        model: nn.Module = nn.Sequential(*hidden, nn.Linear(2048, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        if way == "mpiddp":
            compression = mpiddp.Compression.powersgd(rank=4, start_step=2)
            optimizer = mpiddp.DistributedOptimizer(optimizer, model.named_parameters(), compression=compression)
        elif way == "DDP over gloo":
            # In one bucket: with several, the hook's callbacks order their all-reduces differently on each rank: gloo
            # aborts ("Received data size doesn't match expected size").
            model = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=400)
            state = powerSGD_hook.PowerSGDState(dist.group.WORLD, matrix_approximation_rank=4, start_powerSGD_iter=2)
            model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)

        def step() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()

        for _ in range(4):
            step()
        return step

    return in_turn({way: trained(way) for way in ("mpiddp", "DDP over gloo", "not exchanged")}, seconds, comm)


def worker(order: str) -> None:
    spec = json.loads(order)
    import torch

    import mpiddp

    torch.set_num_threads(1)
    mpiddp.init()  # starts MPI, with the settings that it wants: the other contenders profit by them, too
    from mpi4py import MPI

    case = Case(**spec["case"])
    found = {"steps": steps, "powersgd": powersgd}.get(case.kind, allreduce)(case, spec["seconds"], MPI.COMM_WORLD)
    if MPI.COMM_WORLD.rank == 0:
        print(MARK + json.dumps(found), flush=True)


# -- on the machine that the hosts are on ------------------------------------------------------------------------------


def measure(case: Case, seconds: float, env: dict[str, str]) -> dict[str, dict[str, float]]:
    from tests.harness.launcher import find
    from tests.hosts.hosts import Hosts

    launcher = find()
    assert launcher is not None, "no mpirun beside this Python or on PATH"
    order = json.dumps({"case": asdict(case), "seconds": seconds})
    with Hosts(case.hosts, case.mbit or None, case.delay_us) as hosts:
        job = hosts.start(launcher, [__file__, "--worker", order], case.per_host, env=env)
        done = job.wait(seconds * 3 + 60)
    result = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
    if result is None:
        raise SystemExit(f"{case.title}: no result\n{done}")
    found: dict[str, dict[str, float]] = json.loads(result.removeprefix(MARK))
    return found


def show(case: Case, found: dict[str, dict[str, float]]) -> None:
    print(f"\n{case.title}" + (f" (ideal {case.ideal_s * 1e3:.0f} ms)" if case.ideal_s > 0.01 else ""))
    first = next(iter(found.values()))["time"]
    for name, value in found.items():
        said = f"  {name:14} {value['time'] * 1e3:9.2f} ms  {value['time'] / first:6.2f} of the first"
        if case.ideal_s > 0.01:
            said += f"  {100 * case.ideal_s / value['time']:5.1f} % of the ideal"
        if case.nbytes >= MIB:
            said += f"  {value['cpu'] / case.nbytes * 1e9:5.2f} CPU s/GB"
        if name == "round trip":
            steps_s = (case.hosts - 1).bit_length() * value["time"]
            said += f"  mpiddp takes {first / steps_s:.2f} of log2(p) of them"
        print(said)
    if case.kind == "steps":
        print(f"  bf16 makes {found['float32']['time'] / found['bf16']['time']:.2f} times as many steps")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[case.name for case in CASES], action="append", help="this case")
    parser.add_argument("--seconds", type=float, default=8, help="for each case")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="set on the first host")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.worker:
        worker(arguments.worker)
        return
    env = dict(setting.split("=", 1) for setting in arguments.env)
    for case in CASES:
        if not arguments.only or case.name in arguments.only:
            show(case, measure(case, arguments.seconds, env))


if __name__ == "__main__":
    main()
