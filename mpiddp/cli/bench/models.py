"""What is trained: three models, two optimizers, and the ways of training them that are compared."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ...optimizer import DistributedOptimizer

__all__ = [
    "BESIDE",
    "DDP",
    "FUSED",
    "LOCAL",
    "MODELS",
    "OPTIMIZERS",
    "OWN",
    "SHARDED",
    "VARIANTS_OF_MEMORY",
    "Model",
    "Training",
    "can_shard",
    "largest_gradient_nbytes",
    "parameter_count",
]

OPTIMIZERS = ("sgd", "adamw")

#: Ways of training, as the tables call them. ``local`` steps on every rank at once and exchanges nothing; ``beside``
#: does so in the process in which mpiddp trains, too.
LOCAL, FUSED, BESIDE = "local", "local, fused", "local, beside"
OWN, SHARDED, DDP = "mpiddp", "mpiddp sharded", "DDP over gloo"

#: What ``--memory`` may ask for, and the way of training that it means.
VARIANTS_OF_MEMORY = {"mpiddp": OWN, "sharded": SHARDED, "ddp": DDP, "local": LOCAL}

_CLASSES, _LAYERS, _CONTEXT, _VOCABULARY = 10, 6, 64, 256


@dataclass(frozen=True)
class Model:
    """``build(width)`` makes the module, ``batch(samples, width)`` what it learns from; ``steps`` make a block."""

    build: Callable[[int], nn.Module]
    batch: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
    samples: int
    steps: int = 1


def _mlp(width: int) -> nn.Module:
    """Six hidden layers: 25.2 million parameters at a width of 2048."""
    hidden = [layer for _ in range(_LAYERS) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, _CLASSES))


def _small(_: int) -> nn.Module:
    """17,226 parameters: what a step costs when there is next to nothing to exchange."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, _CLASSES))


class _Gpt(nn.Module):
    """Four blocks of attention to what came before: 3.3 million parameters at a width of 256."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(_VOCABULARY, width)
        self.position = nn.Parameter(torch.zeros(_CONTEXT, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(width, _VOCABULARY)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(_CONTEXT), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.blocks(self.embed(tokens) + self.position, mask=self.mask, is_causal=True)
        return self.head(hidden).flatten(0, 1)  # type: ignore[no-any-return]


def _vectors(samples: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(samples, width), torch.randint(_CLASSES, (samples,))


def _text(samples: int, _: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(_VOCABULARY, (samples, _CONTEXT + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()


#: By the names that ``--models`` takes.
MODELS = {
    "mlp": Model(_mlp, _vectors, samples=32),
    "gpt": Model(lambda width: _Gpt(max(4, width // 8)), _text, samples=4),
    "small": Model(_small, lambda samples, _: _vectors(samples, 64), samples=32, steps=10),
}


def _optimizer(name: str, parameters: Iterator[nn.Parameter], fused: bool | None) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, fused=fused)
    return torch.optim.AdamW(parameters, lr=1e-4, fused=fused)


def can_shard() -> bool:
    """Whether this DistributedOptimizer has the sharded update."""
    return "shard" in inspect.signature(DistributedOptimizer).parameters


def parameter_count(module: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in module.parameters())


def largest_gradient_nbytes(module: nn.Module) -> int:
    """Autograd holds that much before anybody can take it over."""
    return max(parameter.nbytes for parameter in module.parameters())


class Training:
    """One model in training in one of the ways above. Equal on all ranks at first; ``step()`` trains on rank's data."""

    def __init__(self, model: Model, width: int, samples: int | None, optimizer: str, way: str, rank: int) -> None:
        torch.manual_seed(0)
        self.module = model.build(width)
        torch.manual_seed(1 + rank)
        self.inputs, self.targets = model.batch(samples or model.samples, width)
        self._forward: Callable[..., Any] = self.module
        self.optimizer: Any = _optimizer(optimizer, self.module.parameters(), True if way == FUSED else None)
        if way in (OWN, SHARDED):
            options: dict[str, Any] = {"shard": True} if way == SHARDED else {}
            self.optimizer = DistributedOptimizer(self.optimizer, self.module.named_parameters(), **options)
        elif way == DDP:
            self._forward = nn.parallel.DistributedDataParallel(self.module)

    def step(self) -> None:
        """One step, as a training script has it."""
        self.optimizer.zero_grad()
        cross_entropy(self._forward(self.inputs), self.targets).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def fingerprint(self) -> float:
        """A number that is the same on two ranks if their parameters are."""
        return sum(float(parameter.detach().double().sum()) for parameter in self.module.parameters())
