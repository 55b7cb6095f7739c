"""Train a small CNN on scikit-learn's handwritten digits: 1797 images of 8x8 pixels that come with it, no download.

Run it with or without mpirun, on CPUs or GPUs; write a checkpoint, go on from it with any number of ranks, or test it::

    python examples/digits.py
    mpirun -np 2 --bind-to core python examples/digits.py
    mpirun -np 4 --oversubscribe python examples/digits.py --checkpoint digits
    mpirun -np 2 --bind-to core python examples/digits.py --checkpoint digits --resume --epochs 20
    python examples/digits.py --checkpoint digits --eval-only
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, max_pool2d, relu
from torch.utils.data import DataLoader, TensorDataset

import mpiddp

REFERENCE_BATCH = 32  # the global batch that --lr is meant for
TEST_SAMPLES = 360


class Net(nn.Module):
    """Two convolutions and two linear layers. No BatchNorm: its statistics would be those of each rank's shard."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.linear1 = nn.Linear(64 * 4 * 4, 128)
        self.linear2 = nn.Linear(128, 10)
        self.dropout = nn.Dropout(0.3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = relu(self.conv2(relu(self.conv1(images))))
        x = self.dropout(max_pool2d(x, 2).flatten(1))
        return self.linear2(self.dropout(relu(self.linear1(x))))


def load_data() -> tuple[TensorDataset, TensorDataset]:
    """Training and test set, split in the same way on every rank and in every run."""
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.tensor(digits, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST_SAMPLES], order[TEST_SAMPLES:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def augment(images: torch.Tensor) -> torch.Tensor:
    """Turn, scale and shift each image a little, by this rank's own random numbers."""
    count = len(images)
    angle = (torch.rand(count) - 0.5) * 0.4  # up to 11 degrees
    scale = 1 + (torch.rand(count) - 0.5) * 0.2
    shift = (torch.rand(count, 2) - 0.5) * 0.3  # up to 0.6 of a pixel
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(-1, 2, 3)
    grid = affine_grid(theta, list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False)


def learning_rate(args: argparse.Namespace, progress: float) -> float:
    """The rate after ``progress`` epochs: warm-up, then a cosine down to zero.

    N ranks take N times as large a batch and 1/N as many steps. For Adam the rate goes with the square root of the
    batch (for SGD it would go with the batch itself), and the warm-up spares the first steps the larger rate.
    """
    peak = args.lr * math.sqrt(args.batch_size * mpiddp.size() / REFERENCE_BATCH)
    if progress < args.warmup_epochs:
        return peak * progress / args.warmup_epochs
    done = (progress - args.warmup_epochs) / max(args.epochs - args.warmup_epochs, 1e-9)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def place() -> torch.device:
    """This rank's GPU where there is one, else the CPU."""
    device = mpiddp.local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def evaluate(model: nn.Module, dataset: TensorDataset, device: torch.device) -> tuple[float, float]:
    """Accuracy and loss over the whole test set: each rank takes a part, and every sample counts once."""
    sampler = mpiddp.ShardSampler(dataset, shuffle=False, pad=False)
    correct = loss = 0.0
    model.eval()
    with torch.no_grad():
        for images, labels in DataLoader(dataset, batch_size=64, sampler=sampler):
            labels = labels.to(device)
            logits = model(images.to(device))
            correct += (logits.argmax(dim=1) == labels).sum().item()
            loss += cross_entropy(logits, labels, reduction="sum").item()
    # Sums and counts are added up over the ranks, never means: the shards may differ in length.
    return mpiddp.mean(correct, len(sampler)), mpiddp.mean(loss, len(sampler))


class Progress:
    """One line an epoch, on rank 0 alone; on a terminal a bar that moves in between."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.speaks = mpiddp.rank() == 0
        self.moves = self.speaks and writes_to_terminal()

    def step(self, sampler: mpiddp.ShardSampler) -> None:
        if self.moves:
            done = int(30 * sampler.progress)
            print(f"\repoch {sampler.epoch + 1:3}/{self.epochs} [{'#' * done}{'.' * (30 - done)}]", end="", flush=True)

    def line(self, text: str) -> None:
        if self.speaks:
            print(("\r\x1b[K" if self.moves else "") + text, flush=True)


def writes_to_terminal() -> bool:
    """Whether what we print appears on a terminal.

    Under mpirun our own standard output says nothing about it: it is a pipe or a pseudo-terminal to mpirun, whatever
    mpirun's own is. So the launcher's is looked at, where the system shows it (Linux).
    """
    launchers = {"mpirun", "mpiexec", "mpiexec.hydra", "orterun", "prterun"}
    process = os.getppid()
    while process > 1:
        try:
            name = Path(f"/proc/{process}/comm").read_text().strip()
            if name in launchers:
                return str(Path(f"/proc/{process}/fd/1").readlink()).startswith(("/dev/pts/", "/dev/tty"))
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
    return sys.stdout.isatty() and os.get_terminal_size(sys.stdout.fileno()).columns > 0


def train_epoch(
    args: argparse.Namespace,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[tuple[torch.Tensor, ...]],
    sampler: mpiddp.ShardSampler,
    checkpoints: mpiddp.checkpoint.Checkpoints | None,
    progress: Progress,
    device: torch.device,
) -> float:
    """One pass over the training set, or the rest of one; return the mean loss over all ranks."""
    model.train()
    total = count = 0.0
    for images, labels in loader:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, sampler.epoch + sampler.progress)
        loss = cross_entropy(model(augment(images).to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total, count = total + loss.item() * len(labels), count + len(labels)
        sampler.record(len(labels))
        progress.step(sampler)
        if checkpoints is not None and checkpoints.preempted():
            checkpoints.leave(steps_done(sampler))
    return mpiddp.mean(total, count)


def steps_done(sampler: mpiddp.ShardSampler) -> int:
    """What checkpoints are numbered by: the samples that all ranks have taken, since ranks may come and go."""
    return sampler.epoch * sampler.num_samples_total + sampler.consumed


def main() -> None:
    args = parse_args()
    mpiddp.init()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)  # the same on every rank: it builds the model
    device = place()
    model = Net().to(device)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    optimizer = mpiddp.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    exchange = mpiddp.watch_exchange(optimizer)
    train_set, test_set = load_data()
    sampler = mpiddp.ShardSampler(train_set, seed=args.seed)
    # Its own generator, or each new loader would draw from the one that checkpoints keep.
    loader = DataLoader(train_set, args.batch_size, sampler=sampler, generator=torch.Generator())
    torch.manual_seed(args.seed + mpiddp.rank())  # dropout and augmentation: other numbers on each rank
    checkpoints = None
    if args.checkpoint is not None:
        checkpoints = mpiddp.checkpoint.Checkpoints(args.checkpoint, model=model, optimizer=optimizer, sampler=sampler)
        found = (args.resume or args.eval_only) and checkpoints.restore()
        if args.eval_only and not found:
            sys.exit(f"there is no checkpoint in {args.checkpoint}")
    mpiddp.broadcast_parameters(model.state_dict(), root_rank=0)

    progress = Progress(args.epochs)
    samples, seconds = 0, 0.0
    for epoch in range(sampler.next_epoch, 0 if args.eval_only else args.epochs):
        sampler.set_epoch(epoch)
        began = time.perf_counter()
        loss = train_epoch(args, model, optimizer, loader, sampler, checkpoints, progress, device)
        sampler.finish_epoch()
        samples, seconds = samples + len(sampler) * mpiddp.size(), seconds + time.perf_counter() - began
        progress.line(f"epoch {epoch + 1:3}/{args.epochs}  loss {loss:.4f}")
        if checkpoints is not None:
            checkpoints.save(steps_done(sampler))
    if samples:
        progress.line(str(exchange))
        progress.line(f"{samples / seconds:.0f} samples/s on {mpiddp.size()} ranks")
    accuracy, loss = evaluate(model, test_set, device)
    right = round(accuracy * len(test_set))
    progress.line(f"test accuracy {accuracy:.4%} ({right} of {len(test_set)}), loss {loss:.6f}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=32, help="samples a rank and step (default 32)")
    parser.add_argument("--lr", type=float, default=2e-3, help="for a global batch of 32; scaled from there")
    parser.add_argument("--warmup-epochs", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch on each rank: the model is too small for more")
    parser.add_argument("--checkpoint", type=Path, help="a directory, written to after each epoch")
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint, if there is one")
    parser.add_argument("--eval-only", action="store_true", help="test what is in --checkpoint, and train nothing")
    args = parser.parse_args()
    if (args.resume or args.eval_only) and args.checkpoint is None:
        parser.error("--resume and --eval-only need --checkpoint")
    return args


if __name__ == "__main__":
    main()
