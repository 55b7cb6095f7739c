"""A model with a ResNet's ingredients: convolutions, normalisation, a shortcut, and a pooled head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class _Net(nn.Module):
    def __init__(self, norm_layer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, bias=False), norm_layer(8), nn.ReLU(inplace=True))
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), norm_layer(8))
        self.head = nn.Linear(8, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(torch.relu(x + self.block(x)).mean((2, 3)))


def resnet50(norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    return _Net(norm_layer)
