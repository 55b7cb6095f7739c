"""Transforms that leave the size of a stand-in's small images as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Transform = Callable[[torch.Tensor], torch.Tensor]


def _identity(image: torch.Tensor) -> torch.Tensor:
    return image


class Compose:
    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = transforms

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        for transform in self.transforms:
            image = transform(image)
        return image


class Normalize:
    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return (image - self.mean) / self.std


def ToTensor() -> Transform:  # noqa: N802 - its name
    return _identity


def RandomHorizontalFlip() -> Transform:  # noqa: N802
    return _identity


def RandomResizedCrop(size: int) -> Transform:  # noqa: N802
    return _identity


Resize = CenterCrop = RandomCrop = RandomResizedCrop
