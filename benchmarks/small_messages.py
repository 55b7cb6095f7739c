"""Small messages beside torch.distributed's gloo, in one run, interleaved; medians.

    mpirun -np 2 --bind-to core python benchmarks/small_messages.py

Prints: an all-reduce in place of 4 B to 64 KiB; 1,000 asynchronous all-reduces of 1 KiB, then synchronized; the CPU
time of an idle engine; a training step in which a single small gradient is exchanged, against the same step on each
rank alone. Run it on an otherwise idle machine: the figures are microseconds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

import mpiddp

SIZES = (4, 256, 1024, 4096, 16384, 65536)

#: Small calls that are timed together.
CALLS = 100


def interleaved(runs: dict[str, Callable[[], object]], rounds: int, calls: int = 1) -> dict[str, float]:
    """The median time of a call of each, in seconds, the largest over the ranks.

    Each round runs all of them, one after the other, so many calls together, each timed by itself. All ranks begin
    together, and of several calls the first does not count: else one would be charged with the threads that the other
    left behind, and with how far apart it left the ranks.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + rounds // 10 + 1):
        for name, run in runs.items():
            mpiddp.barrier()
            if calls > 1:
                run()
            for _ in range(calls):
                began = time.perf_counter()
                run()
                if round_number > rounds // 10:
                    times[name].append(time.perf_counter() - began)
    medians = torch.tensor([statistics.median(values) for values in times.values()], dtype=torch.float64)
    return dict(zip(runs, mpiddp.allreduce(medians, op=mpiddp.Max).tolist(), strict=True))


def say(text: str) -> None:
    if mpiddp.rank() == 0:
        print(text, flush=True)


def latency(rounds: int) -> None:
    say(f"{'all-reduce in place':>20} {'mpiddp':>10} {'gloo':>10} {'gloo/mpiddp':>12}")
    for nbytes in SIZES:
        tensor = torch.ones(nbytes // 4)

        def gloo(tensor: torch.Tensor = tensor) -> None:
            dist.all_reduce(tensor)

        def own(tensor: torch.Tensor = tensor) -> None:
            mpiddp.allreduce_(tensor)

        found = interleaved({"mpiddp": own, "gloo": gloo}, max(10, rounds // CALLS), CALLS)
        say(
            f"{nbytes:>18} B {found['mpiddp'] * 1e6:>7.1f} us {found['gloo'] * 1e6:>7.1f} us "
            f"{found['gloo'] / found['mpiddp']:>12.1f}"
        )


def burst(rounds: int) -> None:
    tensors = [torch.ones(256) for _ in range(1000)]

    def gloo() -> None:
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()

    def own() -> None:
        for handle in [mpiddp.allreduce_async_(tensor) for tensor in tensors]:
            mpiddp.synchronize(handle)

    found = interleaved({"mpiddp": own, "gloo": gloo}, rounds)
    say(
        f"1,000 asynchronous all-reduces of 1 KiB: mpiddp {found['mpiddp'] * 1e3:.1f} ms, gloo "
        f"{found['gloo'] * 1e3:.1f} ms, gloo/mpiddp {found['gloo'] / found['mpiddp']:.1f}"
    )


def idle() -> None:
    mpiddp.barrier()
    time.sleep(1.5)  # the engine goes to sleep
    began, cpu = time.perf_counter(), time.process_time()
    time.sleep(3.0)
    share = torch.tensor([(time.process_time() - cpu) / (time.perf_counter() - began)])
    say(f"an idle engine uses {100 * mpiddp.allreduce(share, op=mpiddp.Max).item():.2f} % of a core")


def frozen_step(rounds: int) -> None:
    """A model whose only trained parameter is its last bias."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
        model.requires_grad_(False)
        model[-1].bias.requires_grad_(True)
        return model, torch.optim.SGD(model.parameters(), lr=0.01)

    x, y = torch.randn(128, 1024), torch.randint(10, (128,))

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    local_model, local_optimizer = build()
    model, optimizer = build()
    optimizer = mpiddp.DistributedOptimizer(optimizer, model.named_parameters())
    found = interleaved(
        {"local": lambda: step(local_model, local_optimizer), "mpiddp": lambda: step(model, optimizer)}, rounds
    )
    say(
        f"training step with one small gradient: local {found['local'] * 1e3:.2f} ms, mpiddp "
        f"{found['mpiddp'] * 1e3:.2f} ms, mpiddp/local {found['mpiddp'] / found['local']:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000, help="timed calls of each kind and size")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    mpiddp.init()
    path = mpiddp.broadcast_object(tempfile.mktemp(prefix="gloo-store-") if mpiddp.rank() == 0 else None)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=mpiddp.rank(), world_size=mpiddp.size())
    say(
        f"{mpiddp.size()} ranks, torch {torch.__version__}, {mpiddp.__name__} {mpiddp.__version__}, medians, the "
        "slowest rank's"
    )
    latency(arguments.rounds)
    burst(max(10, arguments.rounds // 50))
    idle()
    frozen_step(200)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
