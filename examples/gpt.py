"""Train a small GPT on the bytes of Python's own standard library, and let it write some Python. No download.

Run it with or without mpirun; a larger one on GPUs, one rank each::

    python examples/gpt.py
    mpirun -np 2 --bind-to core python examples/gpt.py
    mpirun -np 2 python examples/gpt.py --amp bf16
    mpirun -np 8 python examples/gpt.py --steps 5000 --layers 8 --width 512 --heads 8 --context 512
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sysconfig
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import mpiddp

VOCABULARY = 256  # a token is a byte
REFERENCE_BATCH = 32  # the global batch that --lr is meant for
VALIDATION_WINDOWS = 64
PROMPT = "def "


class Block(nn.Module):
    """Attention to what came before, then a two-layer network; both added to what comes in."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        wide = 4 * width
        self.mlp = nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width), nn.Dropout(dropout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Bytes in, the logits of the next byte out. The embedding and the last layer share one matrix."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.context = args.context
        self.embed = nn.Embedding(VOCABULARY, args.width)
        self.position = nn.Parameter(torch.zeros(args.context, args.width))
        self.blocks = nn.Sequential(*(Block(args.width, args.heads, args.dropout) for _ in range(args.layers)))
        self.norm = nn.LayerNorm(args.width)
        self.head = nn.Linear(args.width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        for parameter in (self.embed.weight, self.position):
            nn.init.normal_(parameter, std=0.05)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))

    @torch.no_grad()
    def write(self, prompt: str, count: int, temperature: float = 0.7) -> str:
        """``count`` bytes that follow ``prompt``."""
        self.eval()
        tokens = torch.tensor([list(prompt.encode())], device=self.position.device)
        for _ in range(count):
            logits = self(tokens[:, -self.context :])[0, -1].float()
            chosen = torch.multinomial((logits / temperature).softmax(dim=0), 1)
            tokens = torch.cat([tokens, chosen[None]], dim=1)
        return bytes(tokens[0].tolist()).decode(errors="replace")


def read_sources() -> tuple[torch.Tensor, torch.Tensor]:
    """The standard library's .py files as one row of bytes: what to train on, and the last tenth to validate on."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    files = [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]
    text = b"\n".join(path.read_bytes() for path in files)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    split = len(data) * 9 // 10
    return data[:split], data[split:]


def windows(data: torch.Tensor, starts: torch.Tensor, context: int, device: torch.device) -> list[torch.Tensor]:
    """For each start ``context`` bytes, and the same moved on by one: what to read and what to say."""
    rows = data[starts[:, None] + torch.arange(context + 1)].long().to(device)
    return [rows[:, :-1], rows[:, 1:]]


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """Warm-up, then a cosine. For Adam the rate goes with the square root of the batch, which grows with the ranks."""
    peak = args.lr * math.sqrt(args.batch_size * mpiddp.size() / REFERENCE_BATCH)
    warmup = max(1, args.steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, args.steps - warmup))))


class Precision:
    """Mixed precision: which dtype autocast computes in, and the GradScaler that float16 needs."""

    def __init__(self, choice: str, device: torch.device) -> None:
        if choice == "auto":
            on_gpu = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp16"
            choice = on_gpu if device.type == "cuda" else "off"
        self.device = device
        self.dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[choice]
        self.scaler = torch.amp.GradScaler(device.type, enabled=choice == "fp16")

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return torch.autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext()


def validate(model: GPT, data: torch.Tensor, precision: Precision) -> float:
    """The mean loss over the same windows at any number of ranks: each rank takes a part of them."""
    starts = torch.linspace(0, len(data) - model.context - 2, VALIDATION_WINDOWS).long()
    mine = list(mpiddp.ShardSampler(VALIDATION_WINDOWS, shuffle=False, pad=False))
    total = count = 0.0
    model.eval()
    with torch.no_grad(), precision.autocast():
        for ids in torch.tensor(mine, dtype=torch.long).split(16):
            tokens, targets = windows(data, starts[ids], model.context, precision.device)
            total += cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum").item()
            count += targets.numel()
    model.train()
    return mpiddp.mean(total, count)


def say(text: str) -> None:
    if mpiddp.rank() == 0:
        print(text, flush=True)


def place() -> torch.device:
    """This rank's GPU where there is one; else the CPU, whose cores the ranks of a node share."""
    device = mpiddp.local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        cores = os.cpu_count() or 1
        torch.set_num_threads(min(torch.get_num_threads(), max(1, cores // mpiddp.local_size())))
    return device


def train_step(
    args: argparse.Namespace,
    step: int,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    data: torch.Tensor,
) -> torch.Tensor:
    """Read a batch of windows and learn from it; return the loss on this rank."""
    # All ranks draw the same places and each reads its part of them: N ranks learn what one with N times the batch size
    # would, and a resumed run reads the same places again. Dropout differs between ranks.
    places = torch.Generator().manual_seed(args.seed + step)
    starts = torch.randint(len(data) - args.context - 1, (args.batch_size * mpiddp.size(),), generator=places)
    starts = starts[mpiddp.rank() :: mpiddp.size()]
    torch.manual_seed(args.seed + mpiddp.rank() + step * mpiddp.size())
    tokens, targets = windows(data, starts, args.context, precision.device)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(args, step)
    with precision.autocast():
        loss = cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    optimizer.zero_grad()
    precision.scaler.scale(loss).backward()
    precision.scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # of the averaged gradients: alike on every rank
    precision.scaler.step(optimizer)
    precision.scaler.update()
    return loss.detach()


def main() -> None:
    args = parse_args()
    mpiddp.init()
    device = place()
    precision = Precision(args.amp, device)
    torch.manual_seed(args.seed)  # the same on every rank: it builds the model
    model = GPT(args).to(device)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    optimizer = mpiddp.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    exchange = mpiddp.watch_exchange(optimizer)
    checkpoints = None
    if args.checkpoint is not None:
        kept = {"model": model, "optimizer": optimizer, "scaler": precision.scaler}
        checkpoints = mpiddp.checkpoint.Checkpoints(args.checkpoint, **kept)
    first_step = checkpoints.restore() if args.resume else 0
    mpiddp.broadcast_parameters(model.state_dict(), root_rank=0)

    training, validation = read_sources()
    numel = sum(parameter.numel() for parameter in model.parameters())
    say(f"{numel / 1e6:.2f} M parameters, {len(training) / 1e6:.1f} MB to read, {mpiddp.size()} ranks, {device.type}")
    began = time.perf_counter()
    for step in range(first_step, args.steps):
        loss = train_step(args, step, model, optimizer, precision, training)
        done = step + 1
        if checkpoints is not None and checkpoints.preempted():
            checkpoints.leave(done)
        if done % args.log_every and done != args.steps:
            continue
        mean_loss = mpiddp.mean(loss, 1)
        tokens = (done - first_step) * args.batch_size * args.context * mpiddp.size()
        rate = tokens / (time.perf_counter() - began)
        say(f"step {done:5}/{args.steps}  loss {mean_loss:.3f}  {rate:.0f} tokens/s")
        if checkpoints is not None:
            checkpoints.save(done)
    say(str(exchange))
    say(f"validation loss {validate(model, validation, precision):.4f} nats a byte")
    if mpiddp.rank() == 0 and args.sample:
        say(f"--- it writes:\n{model.write(PROMPT, args.sample)}\n---")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32, help="windows a rank and step (default 32)")
    parser.add_argument("--context", type=int, default=64, help="bytes in a window (default 64)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--lr", type=float, default=3e-3, help="for a global batch of 32; scaled from there")
    parser.add_argument("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="auto: on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, default=300, metavar="BYTES", help="what it writes at the end")
    parser.add_argument("--log-every", type=int, default=25, metavar="STEPS")
    parser.add_argument("--checkpoint", type=Path, help="a directory, written to with each line of the log")
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint, if there is one")
    args = parser.parse_args()
    if args.resume and args.checkpoint is None:
        parser.error("--resume needs --checkpoint")
    return args


if __name__ == "__main__":
    main()
