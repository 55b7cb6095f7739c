"""Fixtures: ``world`` and ``shared_path`` in tests on ranks, ``mpirun`` in tests that start a job of their own."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from . import rank
from .job import Completed, Job
from .launcher import Launcher
from .rankjob import ROOT, job_environ

__all__ = ["LAUNCHER", "Mpirun", "mpirun", "ranks_size", "shared_path", "world"]

LAUNCHER = pytest.StashKey[Launcher | None]()

What = str | Path | Sequence[str | Path]


@pytest.fixture
def ranks_size(request: pytest.FixtureRequest) -> int:
    """How many ranks the test runs on."""
    return int(request.param)


@pytest.fixture
def world() -> Any:
    """The package ``mpiddp`` after ``init()``, which is called again if an earlier test has called ``shutdown()``."""
    import mpiddp

    if not mpiddp.is_initialized():
        mpiddp.init()
    return mpiddp


@pytest.fixture
def shared_path(request: pytest.FixtureRequest) -> Path:
    """A directory that all ranks of this test share (``tmp_path`` is each rank's own)."""
    if rank.plugin is None:
        raise pytest.UsageError("shared_path is for tests marked with ranks; elsewhere use tmp_path")
    name = "".join(c if c.isalnum() else "-" for c in request.node.nodeid)[-100:]
    path = rank.plugin.directory / "shared" / name
    path.mkdir(parents=True, exist_ok=True)
    return path


class Mpirun:
    """Starts jobs; see the table in ``tests/conftest.py``. Whatever still runs when the test ends is killed."""

    def __init__(self, launcher: Launcher | None, directory: Path) -> None:
        self.directory, self.jobs = directory, list[Job]()
        self._launcher = launcher

    @property
    def launcher(self) -> Launcher:
        """The MPI in use; skips the test where there is none."""
        if self._launcher is None:
            pytest.skip("no mpirun beside this Python or on PATH")
        return self._launcher

    @property
    def flavour(self) -> str:
        """ "open mpi", "mpich" or "intel mpi"."""
        return self.launcher.flavour

    @property
    def version(self) -> tuple[int, ...]:
        """The launcher's version, such as (5, 0, 11)."""
        return self.launcher.version

    def __call__(
        self, what: What, n: int, *, env: Mapping[str, str | None] | None = None, timeout_s: float = 300,
        expect: int | str | None = 0, arguments: Sequence[str] = (), cwd: Path | str | None = None,
    ) -> Completed:  # fmt: skip
        """Run a job to its end. ``expect``: the exit code that it must have, "failure" for any but 0, None for any."""
        completed = self.start(what, n, env=env, arguments=arguments, cwd=cwd).wait(timeout_s)
        assert not completed.timed_out or expect is None, f"not over within {timeout_s:g} s\n{completed}"
        if expect == "failure":
            assert completed.rc != 0, f"a failure was expected\n{completed}"
        elif expect is not None:
            assert completed.rc == expect, f"exit code {expect} was expected\n{completed}"
        return completed

    def start(
        self, what: What, n: int, *, env: Mapping[str, str | None] | None = None, arguments: Sequence[str] = (),
        cwd: Path | str | None = None,
    ) -> Job:  # fmt: skip
        """Start a job and return at once; for tests that send signals or look while it runs."""
        directory = self.directory / f"job-{len(self.jobs)}"
        directory.mkdir()
        program = [sys.executable, *self.program(what, directory)]
        environ = job_environ(self.launcher if n else None)
        environ.update({k: v for k, v in (env or {}).items() if v is not None})
        for name in [k for k, v in (env or {}).items() if v is None]:
            environ.pop(name, None)
        args = self.launcher.command(n, program, arguments) if n else program
        self.jobs.append(Job(args, directory, environ, cwd or ROOT))
        return self.jobs[-1]

    @staticmethod
    def program(what: What, directory: Path) -> list[str]:
        """Python's arguments: those given, a file, or source code written to one."""
        if isinstance(what, Path):
            return [str(what)]
        if not isinstance(what, str):
            return [os.fspath(part) for part in what]
        script = directory / "script.py"
        script.write_text(textwrap.dedent(what))
        return [str(script)]


@pytest.fixture
def mpirun(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mpirun]:
    """Start jobs of the test's own: ``mpirun(what, n, ...)`` and ``mpirun.start(what, n, ...)``."""
    if rank.plugin is not None:
        raise pytest.UsageError("a test on ranks cannot start another mpirun: leave out the mark or the fixture")
    starter = Mpirun(request.config.stash[LAUNCHER], tmp_path)
    yield starter
    for job in starter.jobs:
        job.kill()
