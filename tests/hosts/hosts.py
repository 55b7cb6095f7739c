"""Hosts as namespaces of this machine, and jobs on them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.harness.job import Job
from tests.harness.launcher import Launcher
from tests.harness.rankjob import ROOT, job_environ

__all__ = ["Hosts", "Unavailable"]

HERE = Path(__file__).resolve().parent
TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}

#: What a job's processes on other hosts need of the environment, which does not reach them by itself.
CARRIED = ("PYTHONPATH", "OMP_NUM_THREADS")


class Unavailable(Exception):
    """Hosts cannot be made here; says why."""


class Hosts:
    """``count`` hosts, host1 (10.77.0.1) to hostN, each with one link, ``eth0``, to all others.

    ``rate_mbit``: of each link, in each direction; None: as fast as the machine can. ``delay_us``: of a frame from any
    host to another (not with every kernel's help: a program of our own carries the frames then, which costs CPU).
    Raises Unavailable where a permission or a tool is missing. To be closed; if this process dies first, even by
    SIGKILL, everything ends with it.
    """

    def __init__(self, count: int, rate_mbit: float | None = None, delay_us: float = 0) -> None:
        missing = sorted({package for tool, package in TOOLS.items() if shutil.which(tool, path=search_path()) is None})
        if missing:
            raise Unavailable(f"not installed: {', '.join(missing)}")
        self.count, self.directory = count, Path(tempfile.mkdtemp(prefix="hosts-"))
        # MPI names files after host and process id, which are the same in every such network.
        (self.directory / "tmp").mkdir()
        self._jobs: list[Job] = []
        self._keeper: subprocess.Popen[str] | None = None
        try:
            self._open("switch" if delay_us else "bridge")
            if rate_mbit is not None:
                self.tell(f"rate {rate_mbit:g}mbit")
            if delay_us:
                self.tell(f"delay {delay_us:g}")
        except BaseException:
            self.close()
            raise

    def _open(self, kind: str) -> None:
        if kind == "switch":
            compiled(HERE / "switch.c", self.directory / "switch")
        # Whoever is not root may be it in a user namespace, where the system lets him.
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        self._user = ["--user", "--preserve-credentials"] if user else []
        command = ["unshare", *user, "--net", "--mount", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._keeper = subprocess.Popen(
            [*command, str(HERE / "network.sh"), str(self.directory), str(self.count), kind],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1,
            env={**os.environ, "PATH": search_path()},
        )  # fmt: skip
        answer = self._answer()
        if answer != "up":
            self._keeper.kill()
            raise Unavailable(f"no namespaces: {answer or self._keeper.stderr.read().strip()}")  # type: ignore[union-attr]
        self._pids = [int((self.directory / f"host{i + 1}.pid").read_text()) for i in range(self.count)]

    def _answer(self) -> str:
        assert self._keeper is not None and self._keeper.stdout is not None
        return self._keeper.stdout.readline().strip()

    def tell(self, line: str) -> None:
        """A command of ``network.sh``: ``rate 100mbit``, ``rate off``, ``cut 2``, ``heal 2``, ``run 2 COMMAND``.

        Also ``delay MICROSECONDS``, where there has been one from the beginning.
        """
        assert self._keeper is not None and self._keeper.stdin is not None
        self._keeper.stdin.write(line + "\n")
        answer = self._answer()
        if answer != "ok":
            raise RuntimeError(f"hosts: {line!r}: {answer or 'the keeper has ended'}")

    def add_bridge(self, name: str, address: str) -> None:
        """On each host an interface of its own that leads nowhere else, all with one address, as docker0 has it."""
        for host in range(1, self.count + 1):
            self.tell(
                f"run {host} ip link add {name} type bridge && ip link add {name}-a type veth peer name {name}-b && "
                f"ip link set {name}-a master {name} up && ip link set {name}-b up && "
                f"ip addr add {address} dev {name} && ip link set {name} up"
            )

    def names(self, ranks_per_host: int = 1) -> str:
        """For mpirun's ``--host``."""
        return ",".join(f"host{i + 1}:{ranks_per_host}" for i in range(self.count))

    def inside(self, host: int, command: Sequence[str], cwd: Path | str = "/") -> list[str]:
        """A command line that runs ``command`` on a host (1 to ``count``)."""
        assert self._keeper is not None
        keeper = str(self._keeper.pid)
        return [
            "nsenter", "-t", keeper, *self._user, "-m", "-n", "-i", f"--pid=/proc/{keeper}/ns/pid_for_children",
            "nsenter", "-t", str(self._pids[host - 1]), "-m", "-n", "-i", "-u", "env", "-C", str(cwd), *command,
        ]  # fmt: skip

    def start(
        self, launcher: Launcher, program: Sequence[str], ranks_per_host: int = 1, *,
        env: Mapping[str, str] | None = None, arguments: Sequence[str] = (), cwd: Path | str = ROOT,
    ) -> Job:  # fmt: skip
        """``mpirun`` on host1, ranks on all; ``program`` are Python's arguments, ``env`` is set on host1 alone."""
        directory = self.directory / f"job-{len(self._jobs)}"
        directory.mkdir()
        environ = {**job_environ(launcher), **(env or {}), "PATH": search_path(), "TMPDIR": str(self.directory / "tmp")}
        agent = f"{HERE / 'agent.sh'} {self.directory}"
        carried = [word for name in CARRIED for word in ("-x", name)]
        placed = ["--prtemca", "plm_ssh_agent", agent, "--host", self.names(ranks_per_host), *carried, *arguments]
        command = launcher.command(self.count * ranks_per_host, [sys.executable, *program], placed)
        self._jobs.append(Job(self.inside(1, command, cwd), directory, environ, cwd))
        return self._jobs[-1]

    def close(self) -> None:
        """End what runs on the hosts, then the hosts."""
        for job in self._jobs:
            job.kill()
        if self._keeper is not None:
            with contextlib.suppress(BrokenPipeError):
                self._keeper.stdin.close()  # type: ignore[union-attr]
            try:
                self._keeper.wait(5)
            except subprocess.TimeoutExpired:
                self._keeper.kill()
                self._keeper.wait()
            self._keeper = None
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Hosts({self.count}, {'open' if self._keeper else 'closed'}, {len(self._jobs)} jobs)"


def search_path() -> str:
    """Where programs are looked for: the administrator's, too, which are not on every user's path."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])


def compiled(source: Path, target: Path) -> None:
    """Compile a C program."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise Unavailable("a delay needs a C compiler, and there is none")
    command = [compiler, "-O2", "-o", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{source.name} does not compile here: {done.stderr.strip()}")
