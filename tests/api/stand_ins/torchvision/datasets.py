"""Images that are noise around one pattern a class. STAND_IN_SAMPLES sets how many there are."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset


class _Images(Dataset[Any]):
    def __init__(self, shape: tuple[int, ...], classes: int, train: bool, transform: Callable[[Any], Any]) -> None:
        generator = torch.Generator().manual_seed(7)
        patterns = torch.rand(classes, *shape, generator=generator)
        self.targets = torch.arange(int(os.environ.get("STAND_IN_SAMPLES", "60"))) % classes
        noise = torch.rand(len(self.targets), *shape, generator=generator.manual_seed(8 + train))
        self.images = 0.7 * patterns[self.targets] + 0.3 * noise
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), int(self.targets[index])


class MNIST(_Images):
    def __init__(self, root: str, train: bool, transform: Callable[[Any], Any], download: bool = False) -> None:
        super().__init__((1, 28, 28), 10, train, transform)


class ImageFolder(_Images):
    def __init__(self, root: str, transform: Callable[[Any], Any]) -> None:
        super().__init__((3, 16, 16), 4, root.endswith("train"), transform)
