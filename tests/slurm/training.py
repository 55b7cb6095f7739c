"""A training of 25 steps for the tests of Slurm: training.py DIRECTORY [hold] [final FILE].

With dropout, a shuffling sampler whose epochs are 4 steps and a bit, and a schedule: everything that a checkpoint must
bring back. "hold": in its first life it waits after step 7 until it is told to leave, and touches DIRECTORY/holding.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mpiddp

HELD_AT, EPOCHS, SAMPLES, BATCH = 7, 5, 38, 4


def main(directory: Path, hold: bool, final: Path | None) -> None:
    mpiddp.init()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = mpiddp.DistributedOptimizer(optimizer, model.named_parameters(), deterministic=True, shard=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    data = TensorDataset(torch.randn(SAMPLES, 6), torch.randint(3, (SAMPLES,)))
    sampler = mpiddp.ShardSampler(data)
    loader = DataLoader(data, BATCH, sampler=sampler, generator=torch.Generator())
    torch.manual_seed(1 + mpiddp.rank())
    checkpoints = mpiddp.checkpoint.Checkpoints(
        directory, model=model, optimizer=optimizer, schedule=schedule, sampler=sampler
    )
    step = first = checkpoints.restore()
    for epoch in range(sampler.next_epoch, EPOCHS):
        sampler.set_epoch(epoch)
        for inputs, targets in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            schedule.step()
            sampler.record(len(inputs))
            step += 1
            must_leave = checkpoints.preempted()
            while hold and first == 0 and step == HELD_AT and not must_leave:
                (directory.parent / f"{directory.name}-holding").touch()
                time.sleep(0.01)  # others want the cores
                must_leave = checkpoints.preempted()
            if must_leave:
                checkpoints.leave(step)
    if mpiddp.rank() == 0:
        print(f"from step {first} to step {step} on {mpiddp.size()} ranks, {mpiddp.cross_size()} nodes", flush=True)
        if final is not None:
            torch.save(model.state_dict(), final)


if __name__ == "__main__":
    words = sys.argv[2:]
    main(Path(sys.argv[1]), "hold" in words, Path(words[words.index("final") + 1]) if "final" in words else None)
