"""In pytest's own process: tests marked ``ranks`` run in jobs, one a size, and are reported as any others."""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
from pathlib import Path
from typing import Any

import pytest

from .launcher import Launcher
from .rankjob import RankJob

__all__ = ["ImportGuard", "ParentPlugin", "size_of"]

# After so many new jobs because of failures in one file at one size, what is left of it is reported as not run.
MOST_RESTARTS = 8


class ImportGuard(importlib.abc.MetaPathFinder):
    """Refuses mpi4py.MPI in pytest's own process: MPI started here would make every mpirun a child of that one."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name == "mpi4py.MPI":
            raise ImportError(
                "pytest's own process must not start MPI: import mpi4py.MPI inside the test and mark it with "
                "@pytest.mark.ranks(1) or more"
            )
        return None


def size_of(item: pytest.Item) -> int | None:
    """The number of ranks that this item runs on; None for an ordinary test."""
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("ranks_size") if callspec is not None else None


class ParentPlugin:
    """Runs the marked tests in jobs. At most one job is alive; it is started when the first of its tests comes up."""

    def __init__(self, config: pytest.Config, launcher: Launcher | None) -> None:
        self.config, self.launcher = config, launcher
        self.job: RankJob | None = None
        self.restarts: dict[tuple[Path, int], int] = {}
        self.done: set[str] = set()

    def pytest_report_header(self) -> str:
        return f"mpi: {self.launcher or 'none found; tests marked with ranks are skipped'}"

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen = config.getoption("--ranks")
        if chosen:
            wanted = {int(n) for n in chosen.split(",")}
            dropped = [item for item in items if (n := size_of(item)) is not None and n not in wanted]
            config.hook.pytest_deselected(items=dropped)
            items[:] = [item for item in items if item not in set(dropped)]
        # All tests of one size stand together, file by file, so that one job runs them: to start it takes longer than
        # most files. It runs ahead of this process, so the others, which may start jobs of their own, come before.
        files = {path: n for n, path in enumerate(dict.fromkeys(item.path for item in items))}
        items.sort(key=lambda item: (size_of(item) or 0, files[item.path]))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        size = size_of(item)
        if size is None:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self.reports(item, size):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        item.session._setupstate.teardown_exact(nextitem)
        return True

    def pytest_sessionfinish(self) -> None:
        self.close()

    def close(self) -> None:
        """Forget the job, if there is one."""
        if self.job is not None:
            self.job.close()
        self.job = None

    def reports(self, item: pytest.Item, size: int) -> list[pytest.TestReport]:
        """Run the item, or take its result from the running job, and turn it into pytest's reports."""
        if self.launcher is None:
            return [note(item, "skipped", (str(item.path), 0, "Skipped: no mpirun beside this Python or on PATH"))]
        if item.get_closest_marker("gpu") and (why := missing_gpu()):
            return [note(item, "skipped", (str(item.path), 0, f"Skipped: {why}"))]
        if self.is_given_up(item, size):
            return [note(item, "failed", f"not run: {MOST_RESTARTS} jobs of this file failed on {size} ranks already")]
        job = self.job_for(item, size)
        job.wait_for(item.nodeid)
        if job.aborted_before(item.nodeid):
            self.end(item, size)
            return self.reports(item, size)
        self.done.add(item.nodeid)
        reports = self.merged(item, job)
        if not job.in_step(item.nodeid):
            self.end(item, size)
        elif list(job.tests)[-1] == item.nodeid:
            reports += ending(item, job)
            self.close()
        return reports

    def end(self, item: pytest.Item, size: int) -> None:
        """Forget a job that cannot go on; what is left of its tests starts another."""
        self.close()
        self.restarts[item.path, size] = self.restarts.get((item.path, size), 0) + 1

    def job_for(self, item: pytest.Item, size: int) -> RankJob:
        """The job that runs this item: the running one, or a new one with all of its size that are not done."""
        if self.job is not None and item.nodeid in self.job.tests:
            return self.job
        assert self.launcher is not None
        self.close()
        items = [
            i for i in item.session.items
            if size_of(i) == size and i.nodeid not in self.done and not self.is_given_up(i, size)
        ]  # fmt: skip
        self.job = RankJob(self.launcher, self.config, items, size)
        return self.job

    def is_given_up(self, item: pytest.Item, size: int) -> bool:
        """Whether too many jobs have ended early in tests of the item's file."""
        return self.restarts.get((item.path, size), 0) > MOST_RESTARTS

    def merged(self, item: pytest.Item, job: RankJob) -> list[pytest.TestReport]:
        """The reports of the rank that the verdict chose; a failure says which rank and what the others did."""
        verdict = job.verdict(item.nodeid)
        if verdict.rank is None:
            report = note(item, "failed", verdict.problem or "")
            report.sections += job.sections(item.nodeid)
            return [report]
        lines = job.logs[verdict.rank].of(item.nodeid, "report")
        reports = [
            self.config.hook.pytest_report_from_serializable(config=self.config, data=line["report"]) for line in lines
        ]
        for report in reports:
            if isinstance(report.longrepr, list):  # the place and reason of a skip, a tuple before it became JSON
                report.longrepr = tuple(report.longrepr)
            if report.failed and verdict.problem:
                blame(report, verdict.problem)
                report.sections += job.sections(item.nodeid)
        return reports


@functools.cache
def missing_gpu() -> str | None:
    """Why tests marked gpu cannot run here; None if they can."""
    import torch

    if torch.version.cuda is None:
        return "needs a GPU, and a torch that is built for CUDA"
    return None if torch.cuda.is_available() else "needs a GPU"


def blame(report: pytest.TestReport, problem: str) -> None:
    """Put the rank in front of the failure's message, in the summary and above the traceback."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        crash.message = f"{problem}: {crash.message}"
    report.sections.insert(0, ("which rank", problem))


def ending(item: pytest.Item, job: RankJob) -> list[pytest.TestReport]:
    """An error after the last test if the job did not end well; a rank's code 1 is of failures reported before."""
    code = job.wait()
    if code == 0 and all((line := log.first("finish")) and line["code"] in (0, 1) for log in job.logs):
        return []
    how = "had to be killed" if code is None else f"ended with code {code}"
    report = note(item, "failed", f"the tests were over, but then the job {how}", when="teardown")
    report.sections += job.sections(item.nodeid)
    return [report]


class Words(str):
    """A failure in words, with the short message that pytest's summary shows."""

    @property
    def reprcrash(self) -> Any:
        return type("Crash", (), {"message": self.splitlines()[0] if self else "", "path": "", "lineno": 0})()


def note(item: pytest.Item, outcome: Any, text: Any, when: Any = "call") -> pytest.TestReport:
    """A report made here rather than by a rank."""
    longrepr = Words(text) if isinstance(text, str) else text
    return pytest.TestReport(item.nodeid, item.location, dict.fromkeys(item.keywords, 1), outcome, longrepr, when)
