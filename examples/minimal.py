"""A plain PyTorch script, made distributed by the eight lines that are marked.

Run it with or without mpirun::

    python examples/minimal.py
    mpirun -np 2 --bind-to core python examples/minimal.py
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import mpiddp  # mpiddp 1


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small network on handwritten digits.")
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    mpiddp.init()  # mpiddp 2
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    dataset = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))
    sampler = mpiddp.ShardSampler(dataset)  # mpiddp 3: each rank draws its own samples
    loader = DataLoader(dataset, batch_size=32, sampler=sampler)  # mpiddp 4: in place of shuffle=True

    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    mpiddp.broadcast_parameters(model.state_dict())  # mpiddp 5: all ranks start equal
    optimizer = mpiddp.DistributedOptimizer(optimizer, model.named_parameters())  # mpiddp 6: gradients are averaged

    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)  # mpiddp 7: a new order each epoch
        for inputs, targets in loader:
            loss = cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if mpiddp.rank() == 0:  # mpiddp 8
            print(f"epoch {epoch}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
