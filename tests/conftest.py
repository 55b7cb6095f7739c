"""How to write tests here.

**On ranks.** ``@pytest.mark.ranks(2, 3)`` on a test, or ``pytestmark = pytest.mark.ranks(2, 3)`` for a file, runs the
body on every rank of an ``mpirun`` of that size. They are ordinary items, ``test_x[np2]`` and ``test_x[np3]``; one
mpirun a size runs them all, file by file, and another what is left after a test that failed on some ranks only. A test
passes if it passes on all ranks and the job ends with code 0.

- Import ``mpi4py.MPI`` inside the test, never at the top of the file: pytest's own process collects it without MPI.
- ``world`` is ``mpiddp`` after ``init()``; ``ranks_size`` the number of ranks; ``shared_path`` a directory of them all.
- ``@pytest.mark.ranks(2, timeout_s=120)`` for a slow one (default 60 s). Before that each rank's stacks are dumped.
- All ranks must skip alike. ``print`` goes to the rank's own output, shown when the test fails.
- A test that needs MPI in one process, too, is marked: ``ranks(1)``.

**Jobs of the test's own**, for failures, signals and whole scripts (not together with the mark)::

    def test_it_ends(mpirun):
        done = mpirun(what, 3, env={"MPIDDP_X": "1", "HOME": None}, timeout_s=20, expect="failure")
        assert "rank 1" in done.stderr and done.seconds < 5

- ``what``: a ``str`` is Python source (dedented), a ``Path`` a script, a list Python's arguments (``["-m", "x"]``).
- The number of ranks may be 0: plain Python without a launcher.
- ``env`` adds variables, None removes one. ``arguments`` are more of mpirun's own. ``cwd``: by default the checkout.
- ``expect``: the exit code that must come (default 0), "failure" for any but 0, None for any, a time-out included.
- The result: ``rc`` (None: killed at ``timeout_s``), ``stdout``, ``stderr``, ``output``, ``seconds``, ``timed_out``.
- ``job = mpirun.start(what, n, ...)`` returns at once: ``job.pid`` (mpirun's), ``job.output()`` so far,
  ``job.wait(timeout_s)``, ``job.kill()``.
- ``mpirun.flavour`` ("open mpi", "mpich", "intel mpi") and ``mpirun.version`` tell which MPI it is.

**Jobs on several hosts**, each a namespace of this machine with a network of its own (tests/hosts); such a test is
skipped, with the reason, where they cannot be::

    def test_far_apart(hosts):
        two = hosts(2, rate_mbit=1000, delay_us=500)  # None and 0 unless given
        two.tell("cut 2")  # and "heal 2", "rate 100mbit", "run 1 COMMAND"; two.add_bridge("docker0", "172.17.0.1/16")
        done = hosts.run(two, what, 2, env={"MPIDDP_X": "1"})  # two ranks on each host; set on the first host alone

**Slow tests**, which start many jobs of their own, carry ``@pytest.mark.slow`` and run with ``--slow`` alone.

**Tests on GPUs** carry ``@pytest.mark.gpu``; they are skipped, without starting a job, where there is no GPU. All ranks
may share one.

**Options**: ``--ranks 2,3`` restricts the sizes, ``--mpi DIR`` names the MPI (a prefix, or the directory of mpirun);
otherwise it is the one beside this Python, else the first on PATH. ``-k``, ``-x`` and node ids work as ever.
"""

from __future__ import annotations

import os
import sys

import pytest

from tests.harness import rank
from tests.harness.fixtures import LAUNCHER, mpirun, ranks_size, shared_path, world
from tests.harness.launcher import find, rank_of
from tests.harness.plugin import ImportGuard, ParentPlugin, missing_gpu
from tests.hosts.fixture import hosts

__all__ = ["hosts", "mpirun", "ranks_size", "shared_path", "world"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mpi", "tests on the ranks of an MPI job")
    group.addoption("--ranks", metavar="N,N", help="run the tests on ranks at these sizes only")
    group.addoption("--mpi", metavar="DIR", help="take mpirun from this directory or its bin")
    group.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ranks(*sizes, timeout_s=60): run on this many ranks of an MPI job")
    config.addinivalue_line("markers", "gpu: needs a GPU, which the ranks may share; skipped where there is none")
    config.addinivalue_line("markers", "slow: starts many jobs of its own; run with --slow, and in CI")
    load_hypothesis_profile()
    if rank.plugin is not None:
        return
    if rank_of(os.environ) is not None:
        raise pytest.UsageError("start pytest without mpirun: it starts the jobs that the tests need itself")
    launcher = find(config.getoption("--mpi"))
    if launcher is None and (config.getoption("--mpi") or os.environ.get("CI")):
        raise pytest.UsageError(f"no mpirun found in {config.getoption('--mpi') or 'this environment or on PATH'}")
    config.stash[LAUNCHER] = launcher
    sys.meta_path.insert(0, ImportGuard())
    config.pluginmanager.register(ParentPlugin(config, launcher), "ranks-parent")


def load_hypothesis_profile() -> None:
    """No deadline on a shared machine; the same examples on every rank, or the ranks fall out of step."""
    try:
        import hypothesis
    except ImportError:
        return
    hypothesis.settings.register_profile("ranks", deadline=None, derandomize=True, database=None)
    hypothesis.settings.load_profile("ranks")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow") or rank.plugin is not None:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (why := missing_gpu()):
        pytest.skip(why)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("ranks")
    if marker is None:
        return
    if "ranks_size" not in metafunc.fixturenames:
        metafunc.fixturenames.append("ranks_size")
    metafunc.parametrize("ranks_size", marker.args, ids=[f"np{n}" for n in marker.args], indirect=True)
