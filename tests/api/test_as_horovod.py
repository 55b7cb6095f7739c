"""``python -m mpiddp.as_horovod``: how the script sees itself, what its children see, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mpiddp.as_horovod.__main__ import command, search_path

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def python(*args: str | Path, cwd: Path, path: str = str(ROOT)) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=environ, capture_output=True, text=True, timeout=180, check=False
    )


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The script that imports everything, beside a package ``horovod`` that must not be imported."""
    (tmp_path / "horovod").mkdir()
    (tmp_path / "horovod" / "__init__.py").write_text("raise SystemExit('a real horovod was imported')")
    return Path(shutil.copy(HERE / "scripts" / "names.py", tmp_path / "names.py"))


def test_the_script_runs_as_it_runs_plainly(script: Path, tmp_path: Path) -> None:
    done = python("-m", "mpiddp.as_horovod", script, "a", "-m", "--b=c", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["argv"] == [str(script), "a", "-m", "--b=c"] and report["file"] == str(script)
    assert report["name"] == "__main__" and report["path"] == str(tmp_path) and report["spec"] == "None"
    assert report["doc"].startswith("Imports everything") and report["startup"] == []
    child = ["__mp_main__", "mpiddp.torch", "0.28.1"]
    assert report["children"] == {"spawn": child, "forkserver": child}
    assert "mpirun" in report["run"] and "mpirun" in report["refused"]["horovod.run"]
    assert "horovod.tensorflow" in report["refused"]["horovod.tensorflow"]
    assert "imported" not in report["refused"].values()


def test_a_module_runs_too_and_errors_look_as_ever(script: Path, tmp_path: Path) -> None:
    done = python("-m", "mpiddp.as_horovod", "-m", "names", "fail", cwd=tmp_path)
    report = json.loads(done.stdout)
    assert report["argv"] == [str(script), "fail"] and report["file"] == str(script)
    assert report["name"] == "__main__" and "name='names'" in report["spec"]
    assert done.returncode == 1 and "KeyError: 'on purpose'" in done.stderr

    script.write_text("import horovod.torch\ndef wrong():\n    return 1 / 0\nwrong()\n")
    served = python("-m", "mpiddp.as_horovod", script, cwd=tmp_path)
    script.write_text("import math\ndef wrong():\n    return 1 / 0\nwrong()\n")
    plain = python(script, cwd=tmp_path)
    assert (served.returncode, served.stderr) == (
        plain.returncode,
        plain.stderr,
    ) and "ZeroDivisionError" in plain.stderr
    script.write_text("import sys\nsys.exit(7)")
    assert python("-m", "mpiddp.as_horovod", script, cwd=tmp_path).returncode == 7
    missing = python("-m", "mpiddp.as_horovod", "missing.py", cwd=tmp_path)
    assert missing.returncode == 2 and "missing.py" in missing.stderr


def test_it_holds_for_that_run_alone(tmp_path: Path) -> None:
    program = "import subprocess, sys; import horovod; sys.exit(horovod.__version__ != '0.28.1')"
    assert python("-m", "mpiddp.as_horovod", "-c", program, cwd=tmp_path).returncode == 0
    assert "No module named 'horovod'" in python("-c", program, cwd=tmp_path).stderr
    # Nothing is loaded before the script asks for it.
    early = "import sys; sys.exit('torch' in sys.modules or 'mpiddp' in sys.modules)"
    assert python("-m", "mpiddp.as_horovod", "-c", early, cwd=tmp_path).returncode == 0


def test_another_sitecustomize_runs_too(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import builtins\nbuiltins.was_here = __file__")
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    program = "import horovod, sitecustomize; print(was_here, sitecustomize.__file__)"
    done = python("-m", "mpiddp.as_horovod", "-c", program, cwd=tmp_path, path=path)
    assert done.stdout.split() == [str(tmp_path / "sitecustomize.py")] * 2, done.stderr


def test_it_works_where_the_script_could_not_import_mpiddp(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import horovod.torch as hvd; hvd.init(); print(hvd.size())")
    done = python("-m", "mpiddp.as_horovod", tmp_path / "train.py", cwd=ROOT, path="")
    assert done.stdout == "1\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [((), 2, "usage"), (("--help",), 0, "usage"), (("--verbose", "x.py"), 2, "unknown option --verbose")],
)
def test_usage(tmp_path: Path, arguments: tuple[str, ...], code: int, words: str) -> None:
    done = python("-m", "mpiddp.as_horovod", *arguments, cwd=tmp_path)
    assert done.returncode == code and words in done.stdout + done.stderr


def test_python_that_reads_no_environment_is_refused(tmp_path: Path) -> None:
    done = python("-E", "-m", "mpiddp.as_horovod", "x.py", cwd=ROOT)
    assert done.returncode == 2 and "without -I, -E and -S" in done.stderr


NAME = "mpiddp.as_horovod"


@pytest.mark.parametrize(
    ("original", "arguments", "expected"),
    [
        (["python", "-m", NAME, "t.py", "-m"], ["t.py", "-m"], ["t.py", "-m"]),
        (["python", "-u", "-W", "error", "-m", NAME, "-m", "x"], ["-m", "x"], ["-u", "-W", "error", "-m", "x"]),
        (["python", "-um", NAME, "t.py"], ["t.py"], ["-u", "t.py"]),
        (["python", f"-m{NAME}", "t.py"], ["t.py"], ["t.py"]),
        (["python", f"-um{NAME}", "t.py"], ["t.py"], ["-u", "t.py"]),
        (["python", "-m", "coverage", "run", "-m", NAME, "t.py"], ["t.py"], ["-m", "coverage", "run", "t.py"]),
        (["python", "debugger.py", "t.py"], ["t.py"], ["t.py"]),
    ],
)
def test_command_lines(original: list[str], arguments: list[str], expected: list[str]) -> None:
    assert command("/bin/python", original, arguments) == ["/bin/python", *expected]


def test_search_path() -> None:
    first = search_path("")
    assert Path(first, "sitecustomize.py").is_file()
    assert search_path("a:b") == f"{first}:a:b" and search_path(f"a:{first}::b") == f"{first}:a:b"


def test_alias_modules() -> None:
    import mpiddp.torch.functions
    from mpiddp.torch.elastic.state import TorchState
    from mpiddp.torch.mpi_ops import allreduce

    import mpiddp
    import mpiddp.torch as hvd

    names: dict[str, Any] = {name: getattr(hvd, name) for name in mpiddp.__all__}
    assert all(value is getattr(mpiddp, name) for name, value in names.items())
    assert set(mpiddp.__all__) == set(hvd.__all__)
    assert allreduce is mpiddp.allreduce and TorchState is mpiddp.elastic.TorchState
    assert mpiddp.torch.functions.broadcast_object is mpiddp.broadcast_object
