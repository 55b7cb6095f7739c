"""Scripts written for Horovod run: unchanged under ``python -m mpiddp.as_horovod``, or with another import line.

The scripts in ``scripts/`` use the API as Horovod's public examples do. Those themselves run here, too, if the variable
``HOROVOD_EXAMPLES`` names the folder that has them (``examples/pytorch`` of Horovod's repository). What they need of
torchvision, tqdm and tensorboard is stood in for by ``stand_ins/``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE / "scripts"
ROOT = HERE.parents[1]
ENV = {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE / "stand_ins")]),
    "PYTHONWARNINGS": "ignore::FutureWarning",
    "STAND_IN_SAMPLES": "48",
}
HOROVOD_IMPORT = "import horovod.torch as hvd"


def run(mpirun: Any, how: str, script: Path, n: int, directory: Path, *args: str) -> str:
    """The output of a script in a directory of its own; ``how``: as_horovod, or the module that it imports instead."""
    if how == "as_horovod":
        what: list[str | Path] = ["-m", "mpiddp.as_horovod", script, *args]
    else:
        text = script.read_text()
        assert text.count(HOROVOD_IMPORT) == 1
        changed = directory / script.name
        changed.write_text(text.replace(HOROVOD_IMPORT, f"import {how} as hvd").replace("\nimport horovod\n", "\n"))
        what = [changed, *args]
    done = mpirun(what, n, env=ENV, cwd=directory)
    return str(done.output)


@pytest.mark.parametrize(
    ("script", "n"),
    [("scaled", 0), ("uneven", 0), ("interrupted", 0), ("scaled", 2), ("uneven", 3), ("interrupted", 3)],
)
def test_as_horovod(mpirun: Any, tmp_path: Path, script: str, n: int) -> None:
    assert f"done on {n or 1}" in run(mpirun, "as_horovod", SCRIPTS / f"{script}.py", n, tmp_path)


@pytest.mark.parametrize(
    ("script", "how"),
    [("scaled", "mpiddp.torch"), ("uneven", "mpiddp"), ("interrupted", "mpiddp.torch"), ("images", "mpiddp")],
)
def test_another_import_line(mpirun: Any, tmp_path: Path, script: str, how: str) -> None:
    assert "done on 2" in run(mpirun, how, SCRIPTS / f"{script}.py", 2, tmp_path)


IMAGE_OPTIONS = [
    ["--workers", "2"],
    ["--fp16-allreduce", "--batches-per-allreduce", "2"],
    ["--use-adasum"],
    ["--gradient-predivide-factor", "2.0", "--batch-size", "5"],
]


@pytest.mark.parametrize("options", IMAGE_OPTIONS, ids=" ".join)
def test_images_and_going_on_from_a_checkpoint(mpirun: Any, tmp_path: Path, options: list[str]) -> None:
    script = SCRIPTS / "images.py"
    assert "resumed from 0 and done on 2" in run(mpirun, "as_horovod", script, 2, tmp_path, *options)
    if "--workers" not in options:
        more = run(mpirun, "as_horovod", script, 2, tmp_path, "--epochs", "4", *options)
        assert "resumed from 2 and done on 2" in more
    lines = [line.split() for line in (tmp_path / "logs" / "scalars.txt").read_text().splitlines()]
    losses = [float(value) for tag, value, _ in lines if tag == "train/loss"]
    assert losses[-1] < losses[0], losses


PUBLIC = {
    "pytorch_mnist.py": ["--epochs", "1", "--fp16-allreduce"],
    "pytorch_synthetic_benchmark.py": ["--batch-size=2", "--num-warmup-batches=1", "--num-iters=2"],
    "pytorch_imagenet_resnet50.py": ["--epochs=1", "--batch-size=4", "--batches-per-allreduce=2"],
    "pytorch_mnist_elastic.py": ["--epochs", "1"],
}


@pytest.mark.skipif("HOROVOD_EXAMPLES" not in os.environ, reason="HOROVOD_EXAMPLES does not name the public examples")
@pytest.mark.parametrize("how", ["as_horovod", "mpiddp"])
@pytest.mark.parametrize("script", PUBLIC)
def test_public_examples(mpirun: Any, tmp_path: Path, script: str, how: str) -> None:
    found = sorted(Path(os.environ["HOROVOD_EXAMPLES"]).rglob(script))
    if not found:
        pytest.skip(f"there is no {script}")
    run(mpirun, how, found[0], 2, tmp_path, *PUBLIC[script])
