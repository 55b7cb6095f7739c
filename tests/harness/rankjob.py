"""One mpirun that runs some tests: started, read while it goes on, ended when it is silent for too long."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from .job import Job
from .launcher import Launcher
from .verdict import RankRecord, Verdict, death, judge

__all__ = ["ROOT", "RankJob", "job_environ"]

ROOT = Path(__file__).resolve().parents[2]

# Limits of the parent, the outermost of three timers: the library's own stall report comes first, then each rank's dump
# of its stacks (rank.DUMP_FRACTION of the limit), then the end of the job. Start-up imports torch on every rank.
START_LIMIT_S = 180.0
TEST_LIMIT_S = 60.0
EXIT_LIMIT_S = 30.0
STALL_SETTINGS = {"MPIDDP_STALL_WARN_S": str(TEST_LIMIT_S / 4), "MPIDDP_STALL_ABORT_S": str(TEST_LIMIT_S / 2)}
POLL_S = 0.02


def limit_of(item: pytest.Item) -> float:
    """The time limit of a test in seconds: ``@pytest.mark.ranks(2, timeout_s=120)``."""
    marker = item.get_closest_marker("ranks")
    return float(marker.kwargs.get("timeout_s", TEST_LIMIT_S)) if marker else TEST_LIMIT_S


def job_environ(launcher: Launcher | None, extra_path: Sequence[Path] = ()) -> dict[str, str]:
    """The environment of a job: this checkout first on the path, so that what is tested is what lies here."""
    environ = dict(os.environ)
    paths = [str(p) for p in (ROOT, *extra_path)] + [p for p in (environ.get("PYTHONPATH"),) if p]
    environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    # Unbuffered, print() writes its words one by one, and those of several ranks mix.
    for name in ("PYTEST_CURRENT_TEST", "PYTHONUNBUFFERED"):
        environ.pop(name, None)
    return launcher.environ(environ) if launcher is not None else {**environ, "OMP_NUM_THREADS": "1"}


@dataclasses.dataclass
class RankLog:
    """What one rank has recorded so far, read on from where the last reading stopped."""

    path: Path
    lines: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    offset: int = 0

    def poll(self) -> bool:
        """Read what is new; True if there was anything."""
        if not self.path.exists():
            return False
        with self.path.open("rb") as file:
            file.seek(self.offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.offset += len(whole)
        self.lines += [json.loads(line) for line in whole.splitlines()]
        return bool(whole)

    def of(self, test: str, kind: str) -> list[dict[str, Any]]:
        """The lines of one kind about one test."""
        return [line for line in self.lines if line["kind"] == kind and line.get("test") == test]

    def first(self, kind: str) -> dict[str, Any] | None:
        """The first line of a kind, if there is one."""
        return next((line for line in self.lines if line["kind"] == kind), None)

    def output(self, test: str) -> str:
        """What the rank wrote during ``test``."""
        begin, end = self.of(test, "begin"), self.of(test, "end")
        path = self.path.with_suffix(".out")
        if not path.exists() or (not begin and self.first("begin")):
            return ""
        data = path.read_bytes()
        return data[begin[0]["output"] if begin else 0 : end[0]["output"] if end else None].decode(errors="replace")


class RankJob:
    """One mpirun that runs some tests on ``size`` ranks; results can be read while it goes on."""

    def __init__(self, launcher: Launcher, config: pytest.Config, items: Sequence[pytest.Item], size: int) -> None:
        self.size, self.tests = size, {item.nodeid: limit_of(item) for item in items}
        self.directory = Path(tempfile.mkdtemp(prefix="ranks-"))
        self.logs = [RankLog(self.directory / f"rank-{rank}.jsonl") for rank in range(size)]
        self.timed_out_s: float | None = None
        spec = {
            "size": size, "tests": self.tests, "directory": str(self.directory), "exit_s": EXIT_LIMIT_S,
            "args": [*rank_arguments(config), *dict.fromkeys(str(item.path) for item in items)],
        }  # fmt: skip
        (self.directory / "job.json").write_text(json.dumps(spec))
        program = [sys.executable, "-m", "tests.harness.rank", str(self.directory / "job.json")]
        environ = STALL_SETTINGS | job_environ(launcher, [config.rootpath])
        self.job = Job(launcher.command(size, program), self.directory, environ, config.rootpath)
        self.last_news = time.monotonic()

    def __repr__(self) -> str:
        return f"RankJob(size={self.size}, tests={len(self.tests)}, {self.job!r})"

    def poll(self) -> None:
        """Read every rank's log."""
        news = [log.poll() for log in self.logs]
        if any(news):
            self.last_news = time.monotonic()

    def running(self) -> bool:
        """True while the job has not ended; ends one that has been silent for longer than its limit."""
        alive = self.job.process.poll() is None
        self.poll()
        if alive and time.monotonic() - self.last_news > self.limit_s():
            self.timed_out_s = self.limit_s()
            self.job.kill()
            self.poll()
            return False
        return alive

    def limit_s(self) -> float:
        """How long the job may be silent in what it does now: starting, the slowest running test, ending."""
        if not all(log.first("start") for log in self.logs):
            return START_LIMIT_S
        last = [log.lines[-1] for log in self.logs]
        if all(line["kind"] == "finish" for line in last):
            return EXIT_LIMIT_S
        tests = [self.tests[line["test"]] for line in last if line.get("test") in self.tests]
        return max(tests) if tests else START_LIMIT_S

    def wait_for(self, test: str) -> None:
        """Wait until every rank has ended ``test`` in the same way, or the job is over."""
        while self.running():
            if self.in_step(test):
                return
            time.sleep(POLL_S)
        self.job.kill()

    def in_step(self, test: str) -> bool:
        """True if every rank has ended ``test``, and all or none failed: the job goes on with the next one."""
        ends = [line for log in self.logs for line in log.of(test, "end")]
        return len(ends) == self.size and (not self.failed(test) or all(line["alike"] for line in ends))

    def aborted_before(self, test: str) -> bool:
        """True if the job was ended after an earlier test, so that what it recorded of this one says nothing."""
        return any(line["kind"] == "abort" and line["test"] != test for log in self.logs for line in log.lines)

    def wait(self) -> int | None:
        """Wait for the end of the job; its exit code, or None if it had to be killed."""
        while self.running():
            time.sleep(POLL_S)
        self.job.kill()
        return None if self.timed_out_s is not None else self.job.process.returncode

    def failed(self, test: str) -> bool:
        """True if the test failed on any rank so far."""
        return any(line["report"]["outcome"] == "failed" for log in self.logs for line in log.of(test, "report"))

    def record(self, rank: int, test: str) -> RankRecord:
        """What one rank did with ``test``."""
        log = self.logs[rank]
        reports = [line["report"] for line in log.of(test, "report")]
        outcomes = {r["outcome"] for r in reports}
        secondary = any(line["secondary"] for line in log.of(test, "report"))
        expected_failure = any("wasxfail" in r for r in reports)
        if "failed" in outcomes:
            return RankRecord(rank, "failed", secondary)
        if not log.of(test, "end"):
            return RankRecord(rank, "unfinished" if log.of(test, "begin") else "not begun")
        if "skipped" in outcomes:
            return RankRecord(rank, "xfailed" if expected_failure else "skipped")
        return RankRecord(rank, "xpassed" if expected_failure else "passed")

    def verdict(self, test: str) -> Verdict:
        """The verdict on ``test`` once :meth:`wait_for` has returned."""
        pids = {start["pid"]: rank for rank, log in enumerate(self.logs) if (start := log.first("start"))}
        ended = death(self.job.output(), pids)
        trouble = [line["text"] for log in self.logs if (line := log.first("trouble"))]
        if trouble:
            ended = trouble[0]
        records = [self.record(rank, test) for rank in range(self.size)]
        return judge(records, ended and f"{ended} during {test.rpartition('::')[2]}", self.timed_out_s)

    def sections(self, test: str) -> Iterator[tuple[str, str]]:
        """What to show below a failure: each rank's outcome, output and stacks, and the launcher's words."""
        yield "ranks", self.verdict(test).summary
        for rank, log in enumerate(self.logs):
            if text := log.output(test):
                yield f"output of rank {rank}", text
            stacks = self.directory / f"rank-{rank}.stack"
            if stacks.exists() and (text := own_frames(stacks.read_text())):
                yield f"stacks of rank {rank}", text
        # After a test's own failure the launcher only tells of the end that this harness made.
        if self.verdict(test).rank is None and (text := self.job.output().strip()):
            yield "output of the launcher", text

    def close(self) -> None:
        """End the job if it still runs and remove its files."""
        self.job.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


def own_frames(stacks: str) -> str:
    """Python stacks without the frames of pytest and of this harness."""
    foreign = ("/_pytest/", "/pluggy/", "/tests/harness/", "<frozen runpy>")
    return "\n".join(line for line in stacks.splitlines() if not any(part in line for part in foreign))


def rank_arguments(config: pytest.Config) -> list[str]:
    """The options of this run that the ranks' pytest must have too."""
    arguments = ["--rootdir", str(config.rootpath), "-s", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    if config.inipath is not None:
        arguments += ["-c", str(config.inipath)]
    arguments += [f"--tb={config.getoption('tbstyle')}", f"--import-mode={config.getoption('importmode')}"]
    arguments += ["-v"] * max(0, config.getoption("verbose")) + (["-l"] if config.getoption("showlocals") else [])
    for warning in config.getoption("pythonwarnings") or ():
        arguments += ["-W", warning]
    return arguments
