"""The examples on GPUs, run as a user runs them, learn what a single process learns."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

EXAMPLES = Path(__file__).parents[2] / "examples"
BATCH = 16

#: How far the validation loss, about 2.5 nats, may lie from a single process's: float32 differs in the order of sums;
#: with 16 bits each rank rounds its own gradients, and float16 may skip other steps while its scale settles.
TOLERANCES = {"off": 0.02, "bf16": 0.05, "fp16": 0.1}


def validation_loss(mpirun: Any, ranks: int, amp: str) -> float:
    """Of a short training with the same global batch at any number of ranks."""
    arguments = ["--steps=60", f"--batch-size={BATCH // max(ranks, 1)}", "--log-every=20", "--sample=20", "--amp", amp]
    done = mpirun([EXAMPLES / "gpt.py", *arguments], ranks, timeout_s=150)
    assert re.search(rf"{max(ranks, 1)} ranks, cuda$", done.stdout, re.MULTILINE), done
    return float(re.findall(r"^validation loss (\S+)", done.stdout, re.MULTILINE)[0])


@pytest.mark.parametrize("amp", TOLERANCES)
def test_gpt_learns_what_a_single_process_does(mpirun: Any, amp: str) -> None:
    alone = validation_loss(mpirun, 0, amp)
    assert alone < 4, "it learns"
    for ranks in (2, 4):
        assert abs(validation_loss(mpirun, ranks, amp) - alone) < TOLERANCES[amp], (ranks, alone)


def test_gpt_goes_on_from_a_checkpoint(mpirun: Any, tmp_path: Path) -> None:
    small = ["--layers=1", "--width=32", "--log-every=2", "--sample=0", "--amp=fp16", "--checkpoint", tmp_path / "gpt"]
    mpirun([EXAMPLES / "gpt.py", *small, "--steps=4"], 2)
    done = mpirun([EXAMPLES / "gpt.py", *small, "--steps=6", "--resume"], 3)
    assert re.findall(r"^step +(\d)/6", done.stdout, re.MULTILINE) == ["6"]


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn")
@pytest.mark.parametrize("ranks", [2, 4])
def test_digits(mpirun: Any, ranks: int) -> None:
    done = mpirun([EXAMPLES / "digits.py"], ranks, timeout_s=150)
    accuracy = re.search(r"^test accuracy ([\d.]+)%", done.stdout, re.MULTILINE)
    assert accuracy is not None and float(accuracy[1]) >= 97, done
