"""The examples, run as a user runs them: as a plain process, and by mpirun."""

from __future__ import annotations

import importlib.util
import re
import time
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
DIGITS = EXAMPLES / "digits.py"
GPT = EXAMPLES / "gpt.py"
SMALL_GPT = ["--steps=6", "--layers=1", "--width=32", "--context=16", "--batch-size=2", "--log-every=2"]
SAMPLE = ["--sample", "20"]

needs_sklearn = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn")


def state_of(directory):
    """What the latest checkpoint in a directory holds."""
    return torch.load(max(directory.glob("step-*")) / "state.pt", weights_only=True)


def accuracy_line(stdout: str) -> str:
    lines = [line for line in stdout.splitlines() if line.startswith("test accuracy")]
    assert len(lines) == 1, stdout
    return lines[0].split(", loss")[0]


def accuracy(stdout: str) -> float:
    return float(accuracy_line(stdout).split()[2].rstrip("%")) / 100


@pytest.mark.parametrize("script", ["minimal.py", "digits.py", "gpt.py"])
def test_help_is_there_without_mpi(mpirun, script):
    if script != "gpt.py":
        pytest.importorskip("sklearn")
    done = mpirun([EXAMPLES / script, "--help"], 0)
    assert "usage:" in done.stdout


def test_minimal_is_a_plain_script_and_at_most_eight_lines():
    lines = (EXAMPLES / "minimal.py").read_text().split('"""')[2].splitlines()
    marks = [int(match[1]) for line in lines if (match := re.search(r"# mpiddp (\d)", line))]
    assert marks == list(range(1, len(marks) + 1))
    assert len(marks) <= 8
    unmarked = [line for line in lines if "# mpiddp" not in line]
    assert not [line for line in unmarked if "mpiddp" in line]


@needs_sklearn
@pytest.mark.parametrize("n", [0, 2])
def test_minimal(mpirun, n):
    done = mpirun([EXAMPLES / "minimal.py", "--epochs", "3"], n)
    losses = [float(loss) for loss in re.findall(r"^epoch \d+: loss ([\d.]+)", done.stdout, re.MULTILINE)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


@needs_sklearn
@pytest.mark.parametrize(
    "n", [pytest.param(1, marks=pytest.mark.slow), 2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))]
)
def test_digits_reaches_the_accuracy_at_any_size(mpirun, n):
    done = mpirun([DIGITS], n)
    assert accuracy(done.stdout) >= 0.97, done
    # Plain lines, one an epoch and from one rank alone, since the output is no terminal.
    assert len(re.findall(r"^epoch +\d+/15  loss", done.stdout, re.MULTILINE)) == 15
    assert "\r" not in done.stdout.replace("\r\n", "\n")  # a pseudo-terminal of mpirun's ends lines with both
    assert re.search(rf"^\d+ samples/s on {n} ranks", done.stdout, re.MULTILINE)


@pytest.mark.slow
@needs_sklearn
def test_digits_tests_one_checkpoint_alike_at_any_size(mpirun, tmp_path):
    checkpoint = tmp_path / "digits"
    trained = accuracy_line(mpirun([DIGITS, "--epochs", "2", "--checkpoint", checkpoint], 2).stdout)
    for n in (0, 1, 3, 4):
        done = mpirun([DIGITS, "--checkpoint", checkpoint, "--eval-only"], n)
        assert accuracy_line(done.stdout) == trained
        assert "epoch" not in done.stdout
    assert len(list(checkpoint.iterdir())) == 2, "one after each epoch, and nothing else"


@pytest.mark.slow
@needs_sklearn
def test_digits_killed_and_resumed_ends_where_it_would_have(mpirun, tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    mpirun([DIGITS, "--epochs", "5", "--checkpoint", straight], 2)
    job = mpirun.start([DIGITS, "--epochs", "5", "--checkpoint", broken], 2)
    deadline = time.monotonic() + 60
    while not list(broken.glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    job.kill()
    stopped_at = state_of(broken)["state"]["sampler"]["epoch"] + 1
    done = mpirun([DIGITS, "--epochs", "5", "--checkpoint", broken, "--resume"], 2)
    resumed = re.findall(r"^epoch +(\d)/5", done.stdout, re.MULTILINE)
    assert resumed == [str(epoch) for epoch in range(stopped_at + 1, 6)]
    one, other = (state_of(path)["state"] for path in (straight, broken))
    assert one["sampler"] == other["sampler"] == {"epoch": 4, "consumed": 1437}
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][name]), name


@needs_sklearn
def test_digits_says_what_resume_needs(mpirun):
    done = mpirun([DIGITS, "--resume"], 0, expect=2)
    assert "need --checkpoint" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_gpt(mpirun, amp):
    done = mpirun([GPT, *SMALL_GPT, *SAMPLE, "--amp", amp], 2)
    assert len(re.findall(r"^step +[246]/6  loss \d\.\d+  \d+ tokens/s", done.stdout, re.MULTILINE)) == 3
    assert len(re.findall(r"^validation loss \d", done.stdout, re.MULTILINE)) == 1
    assert "--- it writes:" in done.stdout


@pytest.mark.slow
def test_gpt_learns_the_same_at_any_size(mpirun):
    small = [GPT, *SMALL_GPT, "--sample=0"]
    alone, both = mpirun([*small, "--batch-size=4"], 0).stdout, mpirun([*small, "--batch-size=2"], 2).stdout
    for line in (r"^step +\d/6  loss (\S+)", r"^validation loss (\S+)"):
        one, other = (re.findall(line, stdout, re.MULTILINE) for stdout in (alone, both))
        assert [float(loss) for loss in other] == pytest.approx([float(loss) for loss in one], abs=2e-3) and one


@pytest.mark.slow
def test_gpt_alone_and_resumed_at_another_size(mpirun, tmp_path):
    checkpoint = tmp_path / "gpt"
    mpirun([GPT, *SMALL_GPT, "--checkpoint", checkpoint, "--sample", "0"], 0)
    assert state_of(checkpoint)["step"] == 6
    arguments = [*SMALL_GPT, "--checkpoint", checkpoint, "--sample", "0", "--resume", "--steps", "8"]
    done = mpirun([GPT, *arguments], 2)
    assert re.findall(r"^step +(\d)/8", done.stdout, re.MULTILINE) == ["8"]
    assert state_of(checkpoint)["step"] == 8
