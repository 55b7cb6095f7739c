"""In each rank of a test job: ``python -m tests.harness.rank JOB.json`` runs pytest on the job's tests, recording.

Each rank writes, under the job's directory: ``rank-R.jsonl`` (what began, each report, what ended), ``rank-R.out`` (all
its output, which outlives a crash), ``rank-R.stack`` (Python stacks at a crash or when a test takes too long).
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from .launcher import rank_of

__all__ = ["RankPlugin", "main", "plugin"]

# How long a failing rank waits for the others' reports before it ends the job.
WAIT_FOR_OTHERS_S = 2.0
# The stacks are dumped when this part of a test's time limit is over: the parent finds them when it ends the job.
DUMP_FRACTION = 0.75
# Exceptions that say only that another rank left or never came: shown after the failure that caused them.
SECONDARY = frozenset({"RankLeftError", "StallError"})

#: The plugin of this process, or None where this process is not a rank of a test job.
plugin: RankPlugin | None = None


class RankPlugin:
    """Chooses the job's tests, in its order, and records what becomes of them; ``spec`` is the parent's order."""

    def __init__(self, spec: dict[str, Any], rank: int) -> None:
        self.spec, self.rank, self.size = spec, rank, int(spec["size"])
        self.directory = Path(spec["directory"])
        self.log = (self.directory / f"rank-{rank}.jsonl").open("a", buffering=1)
        self.stacks = (self.directory / f"rank-{rank}.stack").open("w")
        self.failed = self.secondary = False
        faulthandler.enable(self.stacks)

    def record(self, kind: str, **values: Any) -> None:
        """Append one line; it is whole or absent, whatever happens next."""
        self.log.write(json.dumps({"kind": kind, **values}, default=str) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        # The parent shows the reports; here the terminal would only mix its dots into the tests' own output.
        config.pluginmanager.unregister(name="terminalreporter")
        self.config = config

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.record("trouble", text=f"rank {self.rank} could not collect {report.nodeid}:\n{report.longreprtext}")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        found = {item.nodeid: item for item in items}
        missing = [test for test in self.spec["tests"] if test not in found]
        if missing:
            self.record("trouble", text=f"rank {self.rank} does not find {', '.join(missing)}; it has {sorted(found)}")
        items[:] = [found[test] for test in self.spec["tests"] if test in found]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.failed = self.secondary = False
        limit_s = float(self.spec["tests"][nodeid])
        faulthandler.dump_traceback_later(limit_s * DUMP_FRACTION, file=self.stacks)
        self.record("begin", test=nodeid, output=flushed_nbytes())

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[Any]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        kinds = {kind.__name__ for kind in type(call.excinfo.value).__mro__} if call.excinfo else set()
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.failed |= report.failed
        self.secondary |= report.failed and bool(kinds & SECONDARY)
        self.record("report", test=item.nodeid, report=data, secondary=self.secondary)
        return report

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        faulthandler.cancel_dump_traceback_later()
        alike = self.failed and not self.secondary
        self.record("end", test=nodeid, alike=alike, output=flushed_nbytes())
        if self.failed and not (self.all_ended_alike(nodeid) and alike):
            # The ranks are out of step: the job ends, and what is left of its tests runs in a new one.
            self.record("abort", test=nodeid)
            abort()

    def all_ended_alike(self, nodeid: str) -> bool:
        """Wait for the others' reports, which may tell more than ours; True if all failed, none because of another."""
        deadline = time.monotonic() + WAIT_FOR_OTHERS_S
        alike = json.dumps({"kind": "end", "test": nodeid, "alike": True})[:-1]
        ended = json.dumps({"kind": "end", "test": nodeid})[:-1]
        while True:
            texts = [path.read_text() for path in self.directory.glob("rank-*.jsonl")]
            if sum(ended in text for text in texts) == self.size or time.monotonic() > deadline:
                return sum(alike in text for text in texts) == self.size
            time.sleep(0.02)


def flushed_nbytes() -> int:
    """How much output this rank has written so far, in bytes."""
    sys.stdout.flush()
    sys.stderr.flush()
    return os.fstat(1).st_size


def abort() -> None:
    """End the whole job from this rank."""
    flushed_nbytes()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.COMM_WORLD.Abort(1)
    os._exit(1)


def main(job_file: str) -> int:
    """Run the job's tests in this rank; the exit code is pytest's, but 0 after failures that are all recorded."""
    global plugin
    spec = json.loads(Path(job_file).read_text())
    rank = rank_of(os.environ)
    if rank is None:
        raise SystemExit("tests.harness.rank: this process has no rank; it is started by mpirun, through pytest")
    output = os.open(Path(spec["directory"]) / f"rank-{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    plugin = RankPlugin(spec, rank)
    plugin.record("start", pid=os.getpid())
    code = int(pytest.main([*spec["args"], f"--basetemp={spec['directory']}/tmp-{rank}"], plugins=[plugin]))
    faulthandler.dump_traceback_later(spec["exit_s"] * DUMP_FRACTION, file=plugin.stacks)
    plugin.record("finish", code=code)
    return 0 if code == pytest.ExitCode.TESTS_FAILED else code


if __name__ == "__main__":
    # Imported under its own name, so that a test sees the same module as this one, and a spawned child no second run.
    from tests.harness import rank as this_module

    sys.exit(this_module.main(sys.argv[1]))
