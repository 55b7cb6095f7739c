"""A real Slurm of two nodes: ranks find each other, jobs leave when they are told to, and go on where they were."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mpiddp.cli import main as mpiddp_command
from tests.harness.launcher import ROOT_PERMISSION, Launcher, find
from tests.slurm.cluster import Cluster, missing

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TRAINING = Path(__file__).with_name("training.py")
DIGITS = ROOT / "examples" / "digits.py"
HELD_AT = 7  # as training.py has it

needs_sklearn = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn")


@pytest.fixture(scope="module")
def launcher() -> Launcher:
    found = find()
    if found is None or found.flavour != "open mpi":
        pytest.skip("these tests are written for Open MPI's mpirun and srun --mpi=pmix")
    return found


@pytest.fixture(scope="module")
def slurm(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), cpus=8)
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def environ(launcher: Launcher) -> dict[str, str]:
    """The batch shell finds our mpirun, and ranks on a busy machine give way to each other."""
    path = f"{launcher.mpirun.parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return {**ROOT_PERMISSION, "PATH": path, "PYTHONPATH": str(ROOT), "OMPI_MCA_mpi_yield_when_idle": "1"}


@pytest.fixture(scope="module", autouse=True)
def limited(slurm: Cluster, environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A job near its time limit, and its directory; beside the others, since Slurm needs up to half a minute."""
    folder = tmp_path_factory.mktemp("limited")
    python = [sys.executable, str(TRAINING), str(folder / "checkpoints")]
    # At the limit Slurm sends SIGTERM, and KillWait seconds later SIGKILL.
    job = slurm.submit(batch(folder, "--time", "1", "--signal", "TERM", *python, "hold"), env=environ)
    wait_for(folder / "checkpoints-holding")
    # Limits are in whole minutes; this one is brought forward.
    assert slurm.run(["scontrol", "update", f"jobid={job}", "EndTime=now+1"]).rc == 0
    return job, folder


def batch(folder: Path, *words: str) -> Path:
    """The script that `mpiddp slurm` prints, for two nodes; its output comes to the folder, in one file a job."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert mpiddp_command(["slurm", "--nodes", "2", "--sbatch", "output=out-%A-%a.txt", *words]) == 0
    script = folder / "job.sbatch"
    # Unbound: the test's machine has fewer cores than its Slurm believes.
    text = printed.getvalue()
    for bound, unbound in (
        ("d=cores", "d=none"),
        ("-to hwthread", "-to none"),
        ("slot:PE=$SLURM_CPUS_PER_TASK", "slot"),
    ):
        text = text.replace(bound, unbound)
    script.write_text(text)
    return script


def output(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("out-*.txt")))


def wait_for(path: Path, timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come\n{output(path.parent)}"
        time.sleep(0.02)


def accuracy(text: str) -> float:
    found = re.findall(r"^test accuracy ([\d.]+)%", text, re.MULTILINE)
    assert len(found) == 1, text
    return float(found[0]) / 100


@needs_sklearn
def test_srun_trains(slurm: Cluster, environ: dict[str, str]) -> None:
    words = ["srun", "-N2", "--ntasks-per-node=1", "--mpi=pmix", sys.executable, DIGITS, "--epochs", "12"]
    done = slurm.run(words, env=environ)
    assert done.rc == 0, done
    assert accuracy(done.stdout) >= 0.97 and re.search(r"^\d+ samples/s on 2 ranks", done.stdout, re.MULTILINE)


@needs_sklearn
def test_sbatch_and_mpirun_train(slurm: Cluster, environ: dict[str, str], tmp_path: Path) -> None:
    script = batch(tmp_path, "--launcher", "mpirun", sys.executable, str(DIGITS), "--epochs", "12")
    assert slurm.wait(slurm.submit(script, env=environ), 120) == "COMPLETED", output(tmp_path)
    assert accuracy(output(tmp_path)) >= 0.97


@pytest.fixture(scope="module")
def straight(
    slurm: Cluster, environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """What the training comes to when nothing happens to it."""
    folder = tmp_path_factory.mktemp("straight")
    python = [sys.executable, TRAINING, folder / "checkpoints", "final", folder / "final.pt"]
    done = slurm.run(["srun", "-N2", "-n2", "--mpi=pmix", *python], env=environ)
    assert done.rc == 0 and "from step 0 to step 25 on 2 ranks, 2 nodes" in done.stdout, done
    return torch.load(folder / "final.pt")


@pytest.mark.parametrize("way", ["srun", "mpirun in an array"])
def test_a_requeued_job_goes_on_where_it_was(
    slurm: Cluster, environ: dict[str, str], straight: dict[str, torch.Tensor], tmp_path: Path, way: str
) -> None:
    python = [sys.executable, str(TRAINING)]
    folder, final = tmp_path / "checkpoints", tmp_path / "final.pt"
    how = ["--launcher", way.split()[0], *(["--array", "3"] if "array" in way else [])]
    script = batch(tmp_path, "--requeue", *how, *python, str(folder), "hold", "final", str(final))
    job = slurm.submit(script, env=environ) + ("_3" if "array" in way else "")
    wait_for(tmp_path / "checkpoints-holding")
    signal = ["scancel", "--signal=USR1", *(["--batch"] if way.startswith("mpirun") else []), job]
    for _ in range(2):  # the second changes nothing
        assert slurm.run(signal).rc == 0
    wait_for(folder / f"step-{HELD_AT:08d}")
    assert slurm.wait(job) == "COMPLETED", output(tmp_path)
    facts, said = slurm.job(job), output(tmp_path)
    assert facts["Restarts"] == "1", facts
    assert f"from step {HELD_AT} to step 25 on 2 ranks, 2 nodes" in said, said
    other = torch.load(final)
    assert all(torch.equal(straight[name], other[name]) for name in straight)


def test_a_job_at_its_time_limit_leaves_a_checkpoint(
    slurm: Cluster, environ: dict[str, str], limited: tuple[str, Path]
) -> None:
    job, folder = limited
    assert slurm.wait(job, 100) == "TIMEOUT", output(folder)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{HELD_AT:08d}"]
    words = ["srun", "-N2", "-n2", "--mpi=pmix", sys.executable, TRAINING, folder / "checkpoints"]
    done = slurm.run(words, env=environ)
    assert f"from step {HELD_AT} to step 25" in done.stdout, done


def test_a_job_that_must_make_room_goes_on_later(
    slurm: Cluster, environ: dict[str, str], straight: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Preemption: Slurm sends SIGTERM, and GraceTime seconds later it would end the job without mercy."""
    folder, final = tmp_path / "checkpoints", tmp_path / "final.pt"
    python = [sys.executable, str(TRAINING), str(folder), "hold", "final", str(final)]
    job = slurm.submit(batch(tmp_path, "--requeue", "--signal", "TERM", *python), env=environ)
    wait_for(tmp_path / "checkpoints-holding")
    done = slurm.run(["srun", "--partition=urgent", "--nodes=2", "--exclusive", "true"], env=environ)
    assert done.rc == 0, done
    assert slurm.wait(job) == "COMPLETED", output(tmp_path)
    assert slurm.job(job)["Restarts"] == "1" and f"from step {HELD_AT} to step 25" in output(tmp_path)
    other = torch.load(final)
    assert all(torch.equal(straight[name], other[name]) for name in straight)
