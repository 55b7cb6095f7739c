"""As much of torchvision as scripts need in order to run: random images that can be learnt, and small models."""

from __future__ import annotations

from . import datasets, models, transforms

__all__ = ["datasets", "models", "transforms"]
