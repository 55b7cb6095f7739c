"""`mpiddp run`: the commands that it makes. Nothing is started."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from mpiddp.cli import main
from mpiddp.cli.run import arguments, launchers
from mpiddp.cli.run.command import Job, Machine, command_line
from mpiddp.cli.run.launchers import Launcher
from mpiddp.launch import chosen_parameters

OPEN_MPI = Launcher("/m/mpirun", "open mpi", 5)
SRUN = Launcher("/s/srun", "slurm")
PROGRAM = ["/p/python", "train.py"]
TCP = "--mca btl_tcp_flags 313 --mca btl_tcp_max_send_size 1048576 --mca btl_tcp_links 2"


def line(launcher: Launcher, job: Job, cores: int = 8, root: bool = False, **environ: str) -> str:
    chosen = chosen_parameters(environ, ())
    words = command_line(launcher, job, Machine(cores, root, environ, chosen=chosen))
    assert words[-len(job.program) :] == list(job.program)
    return " ".join(words[: -len(job.program)])


def test_open_mpi() -> None:
    assert line(OPEN_MPI, Job(2, PROGRAM)) == (
        f"/m/mpirun -np 2 --map-by slot:PE=4 --bind-to core {TCP} -x OMP_NUM_THREADS=4"
    )
    crowd = line(OPEN_MPI, Job(9, PROGRAM), root=True, OMP_NUM_THREADS="3")
    assert crowd == (
        f"/m/mpirun --allow-run-as-root -np 9 --oversubscribe --bind-to none {TCP} "
        "--mca mpi_yield_when_idle 1 -x OMP_NUM_THREADS"
    )
    chosen = line(OPEN_MPI, Job(8, PROGRAM, more=["--tag-output"]), OMPI_MCA_btl_tcp_links="4")
    assert "btl_tcp_links" not in chosen and chosen.endswith("OMP_NUM_THREADS=1 --tag-output")


def test_what_somebody_chose_for_open_mpi_stays() -> None:
    """The command line would go before files, environment and what the user adds to it."""

    def given(job: Job, has_wheels: bool = False, **chosen: str) -> list[str]:
        words = command_line(OPEN_MPI, job, Machine(8, False, {}, has_wheels, chosen))
        return [words[at + 1] for at, word in enumerate(words) if word == "--mca"]

    job = Job(2, PROGRAM)
    assert given(job, btl_tcp_links="8") == ["btl_tcp_flags", "btl_tcp_max_send_size"]
    more = Job(2, PROGRAM, more=["--mca", "btl_tcp_flags", "1", "-gmca", "btl_tcp_links", "8"])
    assert given(more) == ["btl_tcp_max_send_size", "btl_tcp_flags"], "the second is the user's"
    assert given(Job(2, PROGRAM, passed=["OMPI_MCA_btl_tcp_links=3"])) == ["btl_tcp_flags", "btl_tcp_max_send_size"]
    assert "pml" in given(job, True) and "pml" in given(job, True, pml="^cm")
    tolerant = Job(2, PROGRAM, hosts="a,b", passed=["MPIDDP_FAULT_TOLERANT=1"])
    assert "--mca pml ob1" in line(OPEN_MPI, tolerant), "init() cannot set it on several hosts"
    for chosen in ("ob1", "^ucx"):
        assert not any(name == "pml" or "ucx" in name for name in given(job, True, pml=chosen)), chosen


def test_open_mpi_on_hosts_of_which_nothing_is_known() -> None:
    job = Job(16, PROGRAM, hosts="a:8,b:8", passed=["DATA=/d", "TOKEN"])
    assert line(OPEN_MPI, job, MPIDDP_BUCKET_MB="5", HOROVOD_X="1") == (
        f"/m/mpirun -np 16 --host a:8,b:8 --bind-to none {TCP} -x MPIDDP_BUCKET_MB -x DATA=/d -x TOKEN"
    )
    known = line(OPEN_MPI, Job(16, PROGRAM, hostfile="hosts", cpus=6))
    assert "--hostfile hosts --map-by slot:PE=6 --bind-to core" in known and "OMP_NUM_THREADS=6" in known


def test_wheels_that_take_gpus_memory() -> None:
    """By themselves where all ranks are here; elsewhere as the user has it."""

    def takes(job: Job, has_wheels: bool = True, **environ: str) -> bool:
        words = command_line(OPEN_MPI, job, Machine(8, False, environ, has_wheels))
        given = (
            words[words.index("pml") - 1 : words.index("pml") + 2] == ["--mca", "pml", "ucx"]
            if "pml" in words
            else False
        )
        assert not given or any(word.startswith("MPIDDP_CUDA_AWARE") for word in words)
        return given

    here, there = Job(2, PROGRAM), Job(2, PROGRAM, hosts="a:1,b:1")
    assert takes(here) and not takes(here, has_wheels=False) and not takes(there)
    assert takes(there, MPIDDP_CUDA_AWARE="1") and not takes(here, MPIDDP_CUDA_AWARE="0")
    assert not takes(here, has_wheels=False, MPIDDP_CUDA_AWARE="1"), "a site's MPI is its own affair"
    assert not takes(here, MPIDDP_LOCAL="nccl") and not takes(here, MPIDDP_FAULT_TOLERANT="1"), "init() refuses both"
    assert not takes(Job(2, PROGRAM, passed=("MPIDDP_LOCAL=nccl",)))
    assert not takes(Job(2, PROGRAM, passed=("MPIDDP_CUDA_AWARE=0",)))


def test_in_a_slurm_job() -> None:
    inside = line(OPEN_MPI, Job(16, PROGRAM), SLURM_JOB_ID="1", SLURM_CPUS_PER_TASK="3")
    assert "slot:PE=3" in inside and "oversubscribe" not in inside
    assert "--bind-to none" in line(OPEN_MPI, Job(16, PROGRAM), SLURM_JOB_ID="1")
    assert line(SRUN, Job(4, PROGRAM, cpus=2, hosts="a:2,b:2")) == (
        "/usr/bin/env OMP_NUM_THREADS=2 /s/srun -n 4 --mpi=pmix --nodes=2 --ntasks-per-node=2 --nodelist=a,b "
        "--export=ALL --cpus-per-task=2 --cpu-bind=cores"
    )
    commas = command_line(SRUN, Job(2, PROGRAM, passed=["MPIDDP_PREEMPT_SIGNAL=USR1,TERM"]), Machine(2, False, {}))
    assert commas[:3] == ["/usr/bin/env", "OMP_NUM_THREADS=1", "MPIDDP_PREEMPT_SIGNAL=USR1,TERM"]
    assert line(SRUN, Job(4, PROGRAM, mpi="pmi2"), SLURM_JOB_ID="1") == "/s/srun -n 4 --mpi=pmi2 --cpu-bind=none"


@pytest.mark.parametrize(
    ("ranks", "hosts", "words"),
    [
        (4, "a,b", "--nodes=2 --nodelist=a,b"),
        (12, "a:6,b:6", "--nodes=2 --ntasks-per-node=6 --nodelist=a,b"),
        (6, "a:6,b:2", "--nodes=1 --ntasks-per-node=6 --nodelist=a"),
        (4, "a,b,a,b", "--nodes=2 --ntasks-per-node=2 --nodelist=a,b"),
        (8, "n[1-2,4]", "--nodelist=n[1-2,4]"),
    ],
)
def test_srun_on_hosts(ranks: int, hosts: str, words: str) -> None:
    assert line(SRUN, Job(ranks, PROGRAM, hosts=hosts)) == f"/s/srun -n {ranks} --mpi=pmix {words} --cpu-bind=none"


@pytest.mark.parametrize(
    ("ranks", "hosts", "said"),
    [
        (8, "a:6,b:2", "6 on a, 2 on b, and srun puts as many on every node: correct it, or --launcher mpirun"),
        (9, "a:4,b:4", "1 more than the slots"),
        (4, "n[1-2]:2", "one by one"),
        (2, "a:x", "a:x is no host and its slots"),
    ],
)
def test_srun_on_hosts_that_it_cannot_serve(ranks: int, hosts: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        command_line(SRUN, Job(ranks, PROGRAM, hosts=hosts), Machine(8, False, {}))


def test_hyperthreads_are_counted_by_some_launchers() -> None:
    def started(launcher: Launcher, job: Job, **environ: str) -> str:
        return " ".join(command_line(launcher, job, Machine(8, False, environ, cpus_per_core=2)))

    slurm = {"SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "8"}
    assert "slot:PE=4 " in started(OPEN_MPI, Job(2, PROGRAM), **slurm)
    assert "--cpus-per-task=8 " in started(SRUN, Job(2, PROGRAM), **slurm)
    odd = {"SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "1"}
    assert "--cpus-per-task=1 " in started(SRUN, Job(2, PROGRAM), **odd), "no more than there are"
    assert "--cpus-per-task=6 " in started(SRUN, Job(2, PROGRAM, cpus=3))
    assert "I_MPI_PIN_DOMAIN 8 " in started(Launcher("/m/mpiexec", "intel mpi", 2021), Job(2, PROGRAM))


@pytest.mark.parametrize("name", ["PBS_NODEFILE", "LSB_MCPU_HOSTS", "PE_HOSTFILE", "FLUX_JOB_ID"])
def test_in_a_job_of_another_scheduler_other_hosts_take_part(name: str) -> None:
    inside = command_line(OPEN_MPI, Job(16, PROGRAM), Machine(8, False, {name: "x"}, has_cuda_wheels=True))
    assert " ".join(inside[:5]) == "/m/mpirun -np 16 --bind-to none" and "ucx" not in inside


def test_mpich_and_intel_mpi() -> None:
    mpich = Launcher("/m/mpiexec", "mpich", 5)
    assert line(mpich, Job(2, PROGRAM)) == "/m/mpiexec -n 2 -bind-to core:4 -genv OMP_NUM_THREADS 4"
    assert line(mpich, Job(4, PROGRAM, hosts="a:2,b:2", passed=["A=1", "B"])) == (
        "/m/mpiexec -n 4 -hosts a:2,b:2 -bind-to none -genv A 1"
    )
    assert line(mpich, Job(9, PROGRAM, hostfile="f"), MPIDDP_X="1") == "/m/mpiexec -n 9 -f f -bind-to none"
    intel = Launcher("/m/mpiexec", "intel mpi", 2021)
    assert "-genv I_MPI_PIN_DOMAIN 4" in line(intel, Job(2, PROGRAM)) and "I_MPI_PIN 0" in line(intel, Job(9, PROGRAM))


@pytest.mark.parametrize(
    ("text", "kind", "major"),
    [
        ("mpirun (Open MPI) 5.0.11\n\nReport bugs to", "open mpi", 5),
        ("mpirun (Open MPI) 4.1.4", "open mpi", 4),
        ("HYDRA build details:\n    Version:           5.0.2\n", "mpich", 5),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.9 Build", "intel mpi", 2021),
    ],
)
def test_what_launchers_say_of_themselves(text: str, kind: str, major: int) -> None:
    assert launchers.from_version("/m", text) == Launcher("/m", kind, major)
    assert launchers.from_version("/m", "slurm 22.05") is None


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_the_launcher_beside_python_goes_first(tmp_path: Path) -> None:
    one = executable(tmp_path / "venv" / "bin" / "mpirun", "echo 'mpirun (Open MPI) 5.0.1'")
    other = executable(tmp_path / "site" / "mpiexec", "echo 'HYDRA build details: Version: 4.2'")
    path = {"PATH": str(other.parent)}
    assert launchers.find("auto", path, tmp_path / "venv") == Launcher(str(one), "open mpi", 5)
    assert launchers.find("mpirun", path, tmp_path) == Launcher(str(other), "mpich", 4)
    executable(other, "echo some mpiexec of somebody")
    assert f"{other} is of no MPI that is known here" in str(launchers.find("auto", path, tmp_path))
    srun = executable(tmp_path / "site" / "srun", "")
    assert launchers.find("auto", {**path, "SLURM_JOB_ID": "1"}, tmp_path) == Launcher(str(srun), "slurm")
    assert launchers.find("srun", {"PATH": ""}, tmp_path) == "no srun on PATH"


def test_run_prints_the_command_and_becomes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(arguments, "find", lambda *_: OPEN_MPI)
    executed: list[Any] = []
    monkeypatch.setattr(arguments.os, "execv", lambda path, words: executed.append((path, words)))
    assert main(["run", "-np", "2", "--cpus-per-rank", "1", "train.py", "--epochs", "3"]) == 0
    path, words = executed[0]
    assert path == words[0] == "/m/mpirun" and words[-4:] == [sys.executable, "train.py", "--epochs", "3"]
    assert capsys.readouterr().err.strip() == " ".join(words)
    assert main(["run", "-np", "2", "--dry-run", "--", "sh", "-c", "true"]) == 0
    assert len(executed) == 1 and capsys.readouterr().out.strip().endswith("/sh -c true")


@pytest.mark.parametrize("option", ["--l", "--h", "--s", "--host", "--time", "-n", "--help"])
def test_options_of_the_program_are_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    monkeypatch.setattr(arguments, "find", lambda *_: OPEN_MPI)
    for words in (["run", "-np", "2", "--dry-run", "--launcher-args=--tag-output"], ["slurm"]):
        assert main([*words, "train.py", option, "3"]) == 0
        assert f" train.py {option} 3" in capsys.readouterr().out


def test_run_in_a_step_s_shell_or_notebook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(arguments, "find", lambda *_: OPEN_MPI)
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main(["run", "-np", "2", "--dry-run", "x.py"])
    assert "this is a rank already" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_PTY_PORT", "4711")
    assert main(["run", "-np", "2", "--dry-run", "x.py"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "-np", "2"], "no program"),
        (["run", "-np", "0", "x"], "must be at least 1"),
        (["run", "-np", "2", "-H", "a:1", "--hostfile", "f", "x"], "not allowed with"),
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and said in capsys.readouterr().err
