"""What compressed gradients cost, save and do to training: examples/gpt.py's model, one row for each compression.

    mpirun -np 2 --bind-to core python benchmarks/compression.py

- sent: what a rank gives to exchanges in a step, once compression has begun; how many times less than without.
- exchange: the time from gradients that lie there to averaged ones, median; nothing else goes on.
- step: a whole training step, median.
- pays below: the speed of a network, in Gbit/s a rank, below which the bytes that are saved take longer than what the
  exchange costs more here; a ring moves each byte twice, and the ranks of this run share memory, where bytes are free.
- loss: on the validation set after ``--steps`` steps, from the same parameters over the same batches; in brackets the
  mean of the last tenth of the training losses.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import mpiddp
from mpiddp.optimizer.wire import Wire


def load_example() -> Any:
    path = Path(__file__).resolve().parents[1] / "examples" / "gpt.py"
    spec = importlib.util.spec_from_file_location("gpt", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpt = load_example()


class Counted:
    """Bytes that were given to exchanges of buckets since the last look."""

    def __init__(self) -> None:
        self.nbytes = 0
        reduce = Wire._reduce

        def counting(wire: Wire, name: str, flat: torch.Tensor, scale: float | None = None) -> Any:
            self.nbytes += flat.nbytes
            return reduce(wire, name, flat, scale)

        Wire._reduce = counting  # type: ignore[method-assign]

    def take(self) -> int:
        taken, self.nbytes = self.nbytes, 0
        return taken


def slowest(times: list[float]) -> float:
    """The median, in milliseconds, on the rank where it is largest."""
    return mpiddp.allreduce(torch.tensor(statistics.median(times) * 1e3), op=mpiddp.Max).item()


def build(args: argparse.Namespace, model_args: argparse.Namespace, compression: Any) -> tuple[Any, Any]:
    torch.manual_seed(args.seed)
    model = gpt.GPT(model_args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=model_args.lr, betas=(0.9, 0.95))
    return model, mpiddp.DistributedOptimizer(optimizer, model.named_parameters(), compression)


def time_exchange(args: argparse.Namespace, model_args: argparse.Namespace, compression: Any, counted: Counted) -> Any:
    """Gradients of noise, exchanged again and again: milliseconds, and bytes a step."""
    model, optimizer = build(args, model_args, compression)
    draw = torch.Generator().manual_seed(mpiddp.rank())
    noise = [torch.randn(param.shape, generator=draw) for param in model.parameters()]
    times, nbytes = [], 0
    for number in range(args.exchanges):
        for param, gradient in zip(model.parameters(), noise, strict=True):
            param.grad = gradient.clone()
        mpiddp.barrier()
        counted.take()
        began = time.perf_counter()
        optimizer._mpiddp_reducer.finish()
        if number >= 3:
            times.append(time.perf_counter() - began)
        nbytes = counted.take()
    return slowest(times), nbytes


def train(args: argparse.Namespace, model_args: argparse.Namespace, compression: Any, data: Any) -> Any:
    """The validation loss, that of the last training steps, and milliseconds a step."""
    model, optimizer = build(args, model_args, compression)
    precision = gpt.Precision("off", torch.device("cpu"))
    losses, times = [], []
    for step in range(args.steps):
        began = time.perf_counter()
        losses.append(float(gpt.train_step(model_args, step, model, optimizer, precision, data[0])))
        times.append(time.perf_counter() - began)
    last = losses[-max(1, args.steps // 10) :]
    return gpt.validate(model, data[1], precision), mpiddp.mean(sum(last), len(last)), slowest(times[args.steps // 2 :])


def rows(args: argparse.Namespace) -> list[tuple[str, Any, int]]:
    """The name of each row, what makes its compression for a first step, and that step."""
    kinds, begin, name = mpiddp.Compression, args.steps // 10, f"powersgd({args.rank})"
    made = [(kind, lambda _, kind=kind: getattr(kinds, kind), 0) for kind in ("none", "bf16", "fp16")]
    made += [(name, partial(kinds.powersgd, args.rank), 0)]
    made += [(f"{name}, from step {begin}", partial(kinds.powersgd, args.rank), begin)]
    return [row for row in made if args.only in row[0]]


def main() -> None:
    args, model_args = parse_args()
    mpiddp.init()
    gpt.place()
    counted, data = Counted(), gpt.read_sources()
    gpt.say(
        f"{'':>26} {'sent':>10} {'less':>7} {'exchange':>10} {'step':>9} {'pays below':>12} "
        f"{f'loss after {args.steps}':>18}"
    )
    plain_ms, plain_nbytes = time_exchange(args, model_args, mpiddp.Compression.none, counted)
    for name, make, begin in rows(args):
        is_plain = name == "none"
        ms, nbytes = (plain_ms, plain_nbytes) if is_plain else time_exchange(args, model_args, make(0), counted)
        loss, last, step_ms = train(args, model_args, make(begin), data)
        saved_bits = 2 * 8 * (plain_nbytes - nbytes)
        pays = "" if is_plain else f"{saved_bits / max(1e-6, (ms - plain_ms) * 1e-3) / 1e9:.1f} Gbit/s"
        gpt.say(
            f"{name:>26} {nbytes / 1e3:>7.0f} kB {plain_nbytes / nbytes:>6.1f}x {ms:>7.2f} ms {step_ms:>6.1f} ms "
            f"{pays:>12} {f'{loss:.4f} ({last:.4f})':>18}"
        )


def parse_args() -> tuple[argparse.Namespace, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--exchanges", type=int, default=40)
    parser.add_argument("--rank", type=int, default=4, help="of PowerSGD (default 4)")
    parser.add_argument("--only", default="", help="the rows whose name has this in it")
    parser.add_argument("--seed", type=int, default=0)
    args, rest = parser.parse_known_args()
    sys.argv = [sys.argv[0], "--batch-size", "16", *rest]  # what examples/gpt.py takes: --layers, --width, --lr, ...
    model_args = gpt.parse_args()
    model_args.steps = args.steps
    return args, model_args


if __name__ == "__main__":
    main()
