"""The test harness itself: its judgement on recorded facts, and what pytest shows of ranks that pass, fail and die."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.harness.launcher import Launcher, parse_version, rank_of
from tests.harness.rankjob import ROOT, own_frames
from tests.harness.verdict import RankRecord, death, judge

OPEN_MPI_5_KILLED = """\
--------------------------------------------------------------------------
prterun noticed that process rank 1 with PID 6542 on node n1 exited on
signal 9 (Killed).
--------------------------------------------------------------------------
"""
OPEN_MPI_4_KILLED = (
    "mpirun noticed that process rank 2 with PID 0 on node n exited on signal 11 (Segmentation fault).\n"
)
OPEN_MPI_5_EXITED = """\
prterun detected that one or more processes exited with non-zero status,
thus causing the job to be terminated. The first process to do so was:

   Process name: [prterun-n1-6558@1,1]
   Exit code:    3
"""
OPEN_MPI_4_EXITED = "  Process name: [[30448,1],0]\n  Exit code:    3\n"
MPICH_KILLED = """\
=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES
=   PID 6614 RUNNING AT n1
=   EXIT CODE: 9
=   CLEANING UP REMAINING PROCESSES
===================================================================================
YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Killed (signal 9)
"""


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (OPEN_MPI_5_KILLED, "rank 1 died by signal 9 (SIGKILL)"),
        (OPEN_MPI_4_KILLED, "rank 2 died by signal 11 (SIGSEGV)"),
        (OPEN_MPI_5_EXITED, "rank 1 exited with code 3"),
        (OPEN_MPI_4_EXITED, "rank 0 exited with code 3"),
        (MPICH_KILLED, "rank 3 died by signal 9 (SIGKILL)"),
        (MPICH_KILLED.replace("6614", "1"), None),
        ("MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD\n", None),
    ],
)
def test_death_is_read_from_what_the_launcher_says(output: str, told: str | None) -> None:
    assert death(output, {6614: 3}) == told


def records(*outcomes: str) -> list[RankRecord]:
    """One record a rank; a trailing "~" makes a failure secondary."""
    return [RankRecord(n, o.rstrip("~"), secondary=o.endswith("~")) for n, o in enumerate(outcomes)]


@pytest.mark.parametrize(
    ("outcomes", "ended", "timed_out_s", "rank", "problem"),
    [
        (["passed", "passed"], None, None, 0, None),
        (["skipped", "skipped"], None, None, 0, None),
        (["xfailed", "xpassed"], None, None, 0, None),
        (["skipped", "passed"], None, None, None, "the ranks disagree: rank 0: skipped, rank 1: passed"),
        (["unfinished", "failed"], None, None, 1, "rank 1 of 2 failed"),
        (["failed", "failed"], None, None, 0, "rank 0 of 2 failed"),
        (["failed~", "passed", "failed"], None, None, 2, "rank 2 of 3 failed"),
        (["failed~", "unfinished"], "rank 1 died", None, None, "rank 1 died"),
        (["failed", "unfinished"], "rank 1 died", None, 0, "rank 0 of 2 failed"),
        (["failed~", "unfinished"], None, None, 0, "rank 0 of 2 failed"),
        (["passed", "unfinished"], None, 5.0, None, "rank 1 of 2 did not end within 5 s"),
        (["passed", "not begun"], None, None, None, "the job ended before rank 1 of 2 did"),
    ],
)
def test_verdict(
    outcomes: list[str], ended: str | None, timed_out_s: float | None, rank: int | None, problem: str | None
) -> None:
    verdict = judge(records(*outcomes), ended, timed_out_s)
    assert (verdict.rank, verdict.problem) == (rank, problem)
    assert verdict.summary.splitlines()[1].startswith(f"rank 1: {outcomes[1].rstrip('~')}")


def test_launchers_are_known_by_their_version() -> None:
    path = Path("/x/bin/mpirun")
    five = parse_version(path, "mpirun (Open MPI) 5.0.11\n\nReport bugs to ...")
    assert five == Launcher(path, "open mpi", (5, 0, 11))
    assert five.command(3, ["python"], ["--tag-output"]) == [
        str(path), "--oversubscribe", "--bind-to", "none", "-n", "3", "--tag-output", "python",
    ]  # fmt: skip
    hydra = parse_version(path, "HYDRA build details:\n    Version:     5.0.2\n    Release Date: ...")
    assert hydra == Launcher(path, "mpich", (5, 0, 2))
    assert hydra.command(2, ["python"]) == [str(path), "-n", "2", "python"]
    intel = parse_version(path, "Intel(R) MPI Library for Linux* OS, Version 2021.11 Build 20231005")
    assert intel is not None and intel.flavour == "intel mpi"
    assert parse_version(path, "slurm 23.02") is None


def test_rank_is_known_before_mpi_starts() -> None:
    assert rank_of({"OMPI_COMM_WORLD_RANK": "2", "PMIX_RANK": "7"}) == 2
    assert rank_of({"PMI_RANK": "1"}) == 1
    assert rank_of({}) is None


def test_stacks_are_shown_without_pytests_own_frames() -> None:
    stacks = 'Thread 1:\n  File "/a/test_x.py", line 3\n  File "/s/_pytest/python.py", line 7\n  File "<frozen runpy>"'
    assert own_frames(stacks) == 'Thread 1:\n  File "/a/test_x.py", line 3'


TESTS_OF_ALL_KINDS = """
import os, sys, time
import pytest

pytestmark = pytest.mark.ranks(2)

def rank():
    from mpi4py import MPI
    return MPI.COMM_WORLD.rank

def barrier():
    from mpi4py import MPI
    MPI.COMM_WORLD.Barrier()

@pytest.mark.parametrize("x", [1, 2])
def test_passes(x, ranks_size, shared_path):
    (shared_path / str(rank())).touch()
    barrier()
    assert sorted(p.name for p in shared_path.iterdir()) == ["0", "1"]
    assert ranks_size == 2

@pytest.mark.skip(reason="not today")
def test_skipped():
    raise AssertionError

@pytest.mark.xfail(strict=True)
def test_expected_failure():
    assert False

def test_one_rank_fails():
    print(f"rank {rank()} was here")
    assert rank() == 0, "only rank 1 says this"
    barrier()

class RankLeftError(Exception): pass

def test_one_fails_because_of_another():
    if rank() == 0: raise RankLeftError("rank 1 left")
    time.sleep(0.2)
    raise ValueError("the cause")

def test_killed():
    if rank() == 1: os.kill(os.getpid(), 9)
    barrier()

@pytest.mark.ranks(2, timeout_s=3)
def test_hangs():
    def waiting_for_nothing(): time.sleep(60)
    if rank() == 1: waiting_for_nothing()
    barrier()

@pytest.mark.parametrize("x", range(20))
def test_all_fail_alike(x):
    barrier()
    assert x in (0, 19)

def test_passes_after_all_that():
    barrier()
"""


@pytest.fixture
def run_tests(request: pytest.FixtureRequest, tmp_path: Path):
    """Run pytest with this harness on files, by default one with this text: (outcomes by test, what it shows)."""

    def run(text: str, *arguments: str, **files: str) -> tuple[dict[str, str], str]:
        (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
        for name, content in {"test_it": text, **files}.items():
            (tmp_path / f"{name}.py").write_text(content)
        (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
        report = tmp_path / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
        if mpi := request.config.getoption("--mpi"):
            command.append(f"--mpi={Path(mpi).absolute()}")
        if not any("test_it.py" in argument for argument in arguments):
            command += ["test_it.py", *(f"{name}.py" for name in files)]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        )  # fmt: skip
        outcomes: dict[str, str] = {}
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
            outcomes[str(case.get("name"))] = kinds[0] if kinds else "passed"
        return outcomes, done.stdout + done.stderr

    return run


@pytest.mark.slow
@pytest.mark.usefixtures("mpirun")
def test_outcomes_of_every_kind(run_tests) -> None:
    outcomes, shown = run_tests(TESTS_OF_ALL_KINDS)
    assert outcomes == {
        "test_passes[np2-1]": "passed",
        "test_passes[np2-2]": "passed",
        "test_skipped[np2]": "skipped",
        "test_expected_failure[np2]": "skipped",
        "test_one_rank_fails[np2]": "failure",
        "test_one_fails_because_of_another[np2]": "failure",
        "test_killed[np2]": "failure",
        "test_hangs[np2]": "failure",
        **{f"test_all_fail_alike[np2-{x}]": "passed" if x in (0, 19) else "failure" for x in range(20)},
        "test_passes_after_all_that[np2]": "passed",
    }, shown
    assert "22 failed, 5 passed, 1 skipped, 1 xfailed" in shown
    for line in (
        "rank 1 of 2 failed: AssertionError: only rank 1 says this",
        "rank 1 was here",
        "rank 1 of 2 failed: ValueError: the cause",
        "rank 0: failed (because another rank left)",
        "rank 1 died by signal 9 (SIGKILL) during test_killed[np2]",
        "ranks 0, 1 of 2 did not end within 3 s",
        "in waiting_for_nothing",
    ):
        assert line in shown, f"{line!r} is missing from\n{shown}"


SELECTION = """
import pytest

@pytest.mark.ranks(1, 2)
def test_a(ranks_size):
    from mpi4py import MPI
    assert MPI.COMM_WORLD.size == ranks_size

@pytest.mark.ranks(2)
def test_b():
    raise SystemExit(0)

def test_plain():
    pass
"""


@pytest.mark.usefixtures("mpirun")
@pytest.mark.parametrize(
    ("arguments", "ran"),
    [
        (["--ranks=1"], {"test_plain": "passed", "test_a[np1]": "passed"}),
        (["-k", "test_a and np2"], {"test_a[np2]": "passed"}),
        (["test_it.py::test_b", "test_it.py::test_a[np2]", "-x"], {"test_b[np2]": "failure"}),
    ],
)
@pytest.mark.slow
def test_selection(run_tests, arguments: list[str], ran: dict[str, str]) -> None:
    outcomes, shown = run_tests(SELECTION, *arguments)
    assert outcomes == ran, shown


FIRST_FILE = """
import os, pytest

@pytest.mark.ranks(2)
def test_first():
    os.environ["HAS_BEEN_HERE"] = "first"

@pytest.mark.ranks(2)
@pytest.mark.parametrize("x", range(10))
def test_kills(x):
    os._exit(3)
"""

SECOND_FILE = """
import os, pytest

@pytest.mark.ranks(2)
def test_second():
    assert "HAS_BEEN_HERE" not in os.environ, "not after all the new jobs"
    os.environ["HAS_BEEN_HERE"] = "second"
"""

THIRD_FILE = """
import os, pytest

@pytest.mark.ranks(2)
def test_third():
    assert os.environ["HAS_BEEN_HERE"] == "second"

def test_plain():
    assert "HAS_BEEN_HERE" not in os.environ
"""


@pytest.mark.slow
@pytest.mark.usefixtures("mpirun")
def test_one_job_runs_files_and_what_is_left_after_a_failure_another(run_tests) -> None:
    outcomes, shown = run_tests(FIRST_FILE, test_second=SECOND_FILE, test_third=THIRD_FILE)
    passed = {"test_first[np2]", "test_second[np2]", "test_third[np2]", "test_plain"}
    assert {name for name, outcome in outcomes.items() if outcome == "passed"} == passed, shown
    assert "not run: 8 jobs of this file failed on 2 ranks already" in shown


BAD_EXIT = """
import pytest

@pytest.mark.ranks(2)
def test_it():
    import atexit, os, time
    from mpi4py import MPI
    atexit.register(lambda: (time.sleep(1), os._exit(3)))  # late enough for the other rank to have ended the test
    MPI.COMM_WORLD.Barrier()
"""


@pytest.mark.slow
@pytest.mark.usefixtures("mpirun")
def test_a_bad_exit_after_passing_tests_is_an_error(run_tests) -> None:
    outcomes, shown = run_tests(BAD_EXIT)
    assert outcomes == {"test_it[np2]": "error"}
    assert "the tests were over, but then the job ended with code 3" in shown


@pytest.mark.slow
def test_mpi_at_the_top_of_a_file_is_refused(run_tests) -> None:
    outcomes, shown = run_tests("from mpi4py import MPI\n")
    assert "import mpi4py.MPI inside the test" in shown and list(outcomes.values()) == ["error"]


def test_mpirun_reports_code_output_and_environment(mpirun) -> None:
    done = mpirun(
        """
        import os, sys
        from mpi4py import MPI
        sys.stdout.write(f"{MPI.COMM_WORLD.rank} {os.environ.get('A')} {os.environ.get('OMP_NUM_THREADS')}\\n")
        """,
        2,
        env={"A": "b", "OMP_NUM_THREADS": None},
    )
    assert sorted(done.stdout.split("\n")) == ["", "0 b None", "1 b None"] and done.rc == 0
    assert mpirun(["-c", "raise SystemExit(4)"], 0, expect="failure").rc == 4
    with pytest.raises(AssertionError, match="exit code 0 was expected"):
        mpirun(["-c", "raise SystemExit(4)"], 0)


@pytest.mark.slow
def test_a_job_that_hangs_is_ended_whole(mpirun) -> None:
    job = mpirun.start(
        "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(60)", 2
    )
    deadline = time.monotonic() + 30
    while job.output().count("up") < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(job.processes()) >= 3
    done = job.wait(0.1)
    assert done.timed_out and done.rc is None and "killed at its time limit" in str(done)
    assert job.processes() == []
