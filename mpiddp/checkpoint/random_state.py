"""The states of a rank's random number generators: Python's, NumPy's, torch's, and that of its GPU."""

from __future__ import annotations

import random
import zlib
from typing import Any

import numpy as np
import torch

__all__ = ["capture", "install", "install_for_new_rank"]


def capture() -> dict[str, Any]:
    """This rank's generators. About 10 KB. The GPU's is that of the current device, where CUDA is in use."""
    state: Any = np.random.get_state(legacy=True)
    kind, keys, *rest = state
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, keys.tobytes(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def install(states: dict[str, Any]) -> None:
    """Go on where :func:`capture` was called. A GPU's state is left out where there is no GPU."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.frombuffer(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def install_for_new_rank(rank: int, first: dict[str, Any]) -> None:
    """For a rank that the checkpoint knows nothing of: numbers of its own, the same in each such resumption.

    ``first`` are rank 0's states, from which the seed is drawn.
    """
    seed = zlib.crc32(first["torch"].numpy().tobytes(), rank)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # the GPUs' too
