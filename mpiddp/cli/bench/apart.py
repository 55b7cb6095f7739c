"""Local training as a script has it that knows nothing of this library: in a process of its own beside each rank.

In the ranks' processes it would be faster than it is today: what they have malloc keep for gradients
(``MPIDDP_HEAP_MB``) serves whatever else trains there, such as torch's default AdamW with its temporaries.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch

from .models import MODELS, Training

__all__ = ["Apart"]

_JOIN_S = 10.0


class Apart:
    """The process of one rank, which trains one model in several ``ways``, a step whenever it is told to.

    ``how``: width, samples and optimizer.
    """

    def __init__(self, model: str, how: tuple[int, int | None, str], ways: Sequence[str], rank: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, torch.get_num_threads(), model, how, ways, rank), daemon=True
        )
        self._process.start()
        theirs.close()
        self._connection.recv()  # it is ready

    def step(self, way: str) -> float:
        """One step; how many seconds it took. EOFError where the process has died, which has said why."""
        self._connection.send(way)
        return float(self._connection.recv())

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(_JOIN_S)


def _serve(
    connection: Connection,
    threads: int,
    model: str,
    how: tuple[int, int | None, str],
    ways: Sequence[str],
    rank: int,
) -> None:
    torch.set_num_threads(threads)
    trainings = {way: Training(MODELS[model], *how, way, rank) for way in ways}
    connection.send("ready")
    while True:
        try:
            way = connection.recv()
        except EOFError:
            return
        began = time.perf_counter()
        trainings[way].step()
        connection.send(time.perf_counter() - began)
