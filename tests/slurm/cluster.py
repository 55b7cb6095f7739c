"""A Slurm of several nodes on this machine, for the tests alone: real daemons, own ports, own keys, own directory.

Everything runs in a PID namespace, which the kernel empties when the test's process ends, however it ends. A Slurm or a
munge of the machine is not touched: none of its sockets, ports, files or processes is used.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.harness.job import Completed

__all__ = ["Cluster", "missing"]

HERE = Path(__file__).parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare", "nsenter")
#: What Slurm's PMIx plugin opens, by this very name; Debian's package has only libpmix.so.2 beside it.
PMIX = "pmix2/lib/libpmix.so"
START_S = 20.0

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/%n/spool
TmpFS={directory}/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/%n/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
JobRequeue=1
KillWait=5
OverTimeLimit=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
"""


def missing() -> str | None:
    """Why there can be no Slurm here; None if there can."""
    if os.geteuid() != 0:
        return "a Slurm for the tests needs root"
    if absent := [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]:
        return f"not installed: {', '.join(absent)}"
    folders = [*Path("/usr/lib").glob("*-linux-gnu"), Path("/usr/lib64"), Path("/usr/lib")]
    if not any((folder / PMIX).exists() for folder in folders):
        return f"Slurm's PMIx plugin finds no {PMIX}"
    probe = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", "--uts", "true"], capture_output=True, text=True
    )
    return f"no namespaces here: {probe.stderr.strip()}" if probe.returncode else None


@dataclasses.dataclass
class Cluster:
    """``nodes`` with ``cpus`` each, from :meth:`start` to :meth:`stop`."""

    directory: Path
    nodes: Sequence[str] = ("n1", "n2")
    cpus: int = 4

    def start(self) -> None:
        """Start the daemons and wait until all nodes are idle."""
        # mpirun names its folders by host and process id, which are the same small numbers in each such namespace: in
        # /tmp it would meet what an earlier one has left. A short name: sockets lie there.
        self._scratch = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.configure()
        self._process = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", str(HERE / "nodes.sh"),
             str(self.directory), *self.nodes],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=(self.directory / "stderr").open("wb"),
            env={**os.environ, "PATH": _path()}, start_new_session=True, preexec_fn=_die_with_parent,
        )  # fmt: skip
        deadline = time.monotonic() + START_S
        while self.states() != ["idle"] * len(self.nodes):
            if time.monotonic() > deadline or self._process.poll() is not None:
                said = "".join(path.read_text(errors="replace") for path in self.logs())
                self.stop()
                raise RuntimeError(f"Slurm did not start\n{said}")
            time.sleep(0.05)

    def configure(self) -> None:
        """Write slurm.conf and the key."""
        for folder in ("state", *(f"{node}/spool" for node in self.nodes)):
            (self.directory / folder).mkdir(parents=True)
        key = self.directory / "munge.key"
        key.touch(0o400)
        key.write_bytes(secrets.token_bytes(1024))
        port, *ports = free_ports(1 + len(self.nodes))
        text = CONF.format(host=socket.gethostname(), port=port, directory=self.directory)
        for node, own in zip(self.nodes, ports, strict=True):
            text += f"NodeName={node} NodeAddr=127.0.0.1 Port={own} CPUs={self.cpus} RealMemory=1000 State=UNKNOWN\n"
        partition = f"Nodes={','.join(self.nodes)} MaxTime=INFINITE State=UP"
        text += f"PartitionName=all {partition} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=10\n"
        text += f"PartitionName=urgent {partition} PriorityTier=10 PreemptMode=OFF\n"
        (self.directory / "slurm.conf").write_text(text)

    def stop(self) -> None:
        """End the daemons and all jobs."""
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def states(self) -> list[str]:
        """Of the nodes, such as ``idle``; empty before the controller answers."""
        done = self.run(["sinfo", "-h", "-N", "-p", "all", "-o", "%T"], timeout_s=60)
        return done.stdout.split() if done.rc == 0 else []

    def logs(self) -> list[Path]:
        """What the daemons have written."""
        return sorted(path for path in self.directory.rglob("*") if path.name == "stderr" or path.suffix == ".log")

    def run(
        self, command: Sequence[str | Path], timeout_s: float = 180, env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Completed:  # fmt: skip
        """Run a command of Slurm's (srun, sbatch, scontrol ...) to its end."""
        began = time.monotonic()
        # In the namespace of the daemons, so that it ends with them: srun is two processes, and ignores SIGTERM.
        args = ["nsenter", "--pid", f"--target={self._first_pid()}", *(os.fspath(part) for part in command)]
        done = subprocess.run(
            args, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False, cwd=cwd,
            env=self.environ(env or {}),
        )  # fmt: skip
        return Completed(args, done.returncode, done.stdout, done.stderr, time.monotonic() - began)

    def _first_pid(self) -> int:
        """The process that is the first one of the namespace, as seen from here."""
        deadline = time.monotonic() + START_S
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        while not (found := children.read_text().split()):
            assert time.monotonic() < deadline and self._process.poll() is None, "the namespace did not come to be"
            time.sleep(0.01)
        return int(found[0])

    def environ(self, more: Mapping[str, str]) -> dict[str, str]:
        """The variables for Slurm's commands; nothing of a job that the tests may run in."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "PMI"))}
        return {
            **kept,
            "PATH": _path(),
            "SLURM_CONF": str(self.directory / "slurm.conf"),
            "TMPDIR": str(self._scratch),
            **more,
        }

    def submit(self, script: Path, *arguments: str, env: Mapping[str, str] | None = None) -> str:
        """sbatch; the job's id."""
        done = self.run(["sbatch", "--parsable", *arguments, script], env=env, cwd=script.parent)
        assert done.rc == 0, done
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What scontrol says of a job."""
        words = self.run(["scontrol", "-o", "show", "job", job]).stdout.split()
        return dict(word.partition("=")[::2] for word in words)

    def wait(self, job: str, timeout_s: float = 240) -> str:
        """Wait until a job has ended, and does not wait in the queue; its state, such as COMPLETED or TIMEOUT."""
        deadline = time.monotonic() + timeout_s
        hurried = "0"
        while True:
            facts = self.job(job)
            state = facts.get("JobState", "")
            if state not in ("", "PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
                return state
            if state == "PENDING" and facts.get("Restarts", "0") != hurried:
                # A requeued job waits two minutes before it may start. In the second in which its first life was ended
                # it must not: the nodes take its credential for the old one's and refuse it.
                self.run(["scontrol", "update", f"jobid={job}", "StartTime=now+2"])
                hurried = facts["Restarts"]
            assert time.monotonic() < deadline, f"job {job} is not over: {facts}"
            time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _die_with_parent() -> None:
    """Killed when the thread that started us ends: nothing is left behind by a test that was killed."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
