"""One job in a session of its own: output to files (no pipe that a lost process could hold open), ended whole."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["Completed", "Job", "marked_processes"]

# Time for mpirun to end its ranks and to remove its files after SIGTERM, before everything is killed.
TERMINATE_S = 2.0
# Killed processes are gone at once, unless the kernel holds them (a dead network file system): then we go on without.
KILL_S = 5.0
# Marks the environment of all processes of a job: launchers give them process groups, and hydra sessions, of their own.
JOB_MARK = "RANKS_TEST_JOB"


@dataclasses.dataclass(frozen=True)
class Completed:
    """What is left of a job: ``rc`` (None if it had to be killed), its output, and how long it took."""

    args: list[str]
    rc: int | None
    stdout: str
    stderr: str
    seconds: float

    @property
    def timed_out(self) -> bool:
        """True if the job was killed because its time was up."""
        return self.rc is None

    @property
    def output(self) -> str:
        """Both streams, stdout first."""
        return self.stdout + self.stderr

    def __str__(self) -> str:
        how = "killed at its time limit" if self.timed_out else f"exit code {self.rc}"
        return (
            f"{' '.join(self.args)}\n{how} after {self.seconds:.1f} s\n"
            f"--- stdout ---\n{self.stdout}--- stderr ---\n{self.stderr}"
        )


class Job:
    """A started process in a session of its own; :meth:`kill` ends it with everything that it has started."""

    def __init__(self, args: Sequence[str], directory: Path, env: Mapping[str, str], cwd: Path | str) -> None:
        self.args = list(args)
        self.stdout_path, self.stderr_path = directory / "stdout", directory / "stderr"
        self.mark, self.started = uuid.uuid4().hex, time.monotonic()
        with self.stdout_path.open("wb") as out, self.stderr_path.open("wb") as err:
            self.process = subprocess.Popen(
                self.args, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=cwd, start_new_session=True,
                env={**env, JOB_MARK: self.mark},
            )  # fmt: skip

    def __repr__(self) -> str:
        return f"Job(pid={self.process.pid}, rc={self.process.poll()}, {' '.join(self.args)})"

    @property
    def pid(self) -> int:
        """The launcher's process id."""
        return self.process.pid

    def output(self) -> str:
        """What was written so far, stdout first."""
        return self.stdout_path.read_text(errors="replace") + self.stderr_path.read_text(errors="replace")

    def wait(self, timeout_s: float) -> Completed:
        """Wait for the end; a job that takes longer is killed whole and has ``rc`` None."""
        rc: int | None
        try:
            rc = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            rc = None
        seconds = time.monotonic() - self.started
        self.kill()
        out, err = (p.read_text(errors="replace") for p in (self.stdout_path, self.stderr_path))
        return Completed(self.args, rc, out, err, seconds)

    def processes(self) -> list[int]:
        """The ids of the job's live processes, the launcher among them."""
        return marked_processes(self.mark)

    def kill(self) -> None:
        """End every process of the job: first ask the launcher, then SIGKILL whatever is left."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(TERMINATE_S)
        deadline = time.monotonic() + KILL_S
        while (left := self.processes()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        self.process.wait()


def marked_processes(mark: str) -> list[int]:
    """The live processes whose environment says ``JOB_MARK=mark``."""
    needle = f"{JOB_MARK}={mark}".encode()
    members = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended while we looked, or is another user's
            if needle in (entry / "environ").read_bytes().split(b"\0"):
                members.append(int(entry.name))
    return members
