"""`mpiddp slurm`: the scripts that it prints."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mpiddp.cli import main


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["slurm"], "no program"),
        (["slurm", "--nodes", "0", "x"], "must be at least 1"),
        (["slurm", "--launcher", "mpirun", "--signal", "TERM", "x"], "hands on only USR1 and USR2"),
        (["slurm", "--signal", "", "--requeue", "x"], "--requeue needs a --signal"),
        (["slurm", "--signal", "FOO", "x"], "--signal FOO: FOO is no signal"),
        (["slurm", "--signal", "9", "x"], "KILL is no signal that a process can receive"),
        (["slurm", "--signal", "USR1,TERM", "x"], "Slurm sends one"),
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2 and said in capsys.readouterr().err


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["slurm", *words]) == 0
    text = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    return text


def test_a_script_with_srun(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(
        capsys, "--nodes", "2", "--gpus-per-node", "4", "--cpus-per-rank", "8", "--requeue", "--array", "0-9",
        "--sbatch", "partition=gpu", "--module", "openmpi/5", "python", "dir/train.py", "--name", "a b",
    )  # fmt: skip
    options = [word.removeprefix("#SBATCH --") for word in text.splitlines() if word.startswith("#SBATCH")]
    assert options == [
        "job-name=train", "nodes=2", "ntasks-per-node=4", "cpus-per-task=8", "gpus-per-node=4", "time=01:00:00",
        "signal=USR1@120", "requeue", "array=0-9", "output=%x-%A_%a.out", "open-mode=append", "partition=gpu",
    ]  # fmt: skip
    assert 'srun --mpi=pmix --cpus-per-task="$SLURM_CPUS_PER_TASK" --cpu-bind=cores \\\n    python dir/train.py' in text
    assert "'a b'" in text and "module load openmpi/5" in text and "export MPIDDP_REQUEUE=1" in text


def test_values_with_blanks_and_signals_by_number(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--job-name", "my job", "--signal", "10", "--sbatch", 'comment="a b"', "--sbatch", 'x=a "b"', "x.py"]
    text = printed(capsys, *words)
    assert '#SBATCH --job-name="my job"\n' in text and '#SBATCH --comment="a b"\n' in text
    assert r'#SBATCH --x="a \"b\""' in text
    assert "signal=USR1@120" in text and "MPIDDP_PREEMPT_SIGNAL=USR1\n" in text


def test_the_job_s_variables_are_filled_in_when_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sh", "-c", "$SLURM_PROCID", "d/$SLURM_ARRAY_TASK_ID $a `b`\\", "${SLURM_JOB_ID}", "x y"]
    command = printed(capsys, "--array", "0-9", *words).splitlines()[-1]
    environ = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_JOB_ID": "5", "PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", "-uc", f"printf '%s|' {command}"], env=environ, stdout=subprocess.PIPE, check=True)
    assert done.stdout.decode() == "sh|-c|$SLURM_PROCID|d/7 $a `b`\\|5|x y|"


STAND_IN = """
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: (print("told", flush=True), sys.exit(5)))
open("ready", "w").close()
time.sleep(60)
"""


def test_a_script_with_mpirun_hands_the_signal_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The shell is signalled, as Slurm does it; what it started ends with 5, and so does the shell."""
    text = printed(capsys, "--launcher", "mpirun", "--signal", "SIGUSR1", "--seconds-before", "60", "python", "x.py")
    assert "#SBATCH --signal=B:USR1@60" in text and "-x MPIDDP_PREEMPT_SIGNAL" in text
    (tmp_path / "mpirun").write_text(f"#!/bin/sh\nexec {sys.executable} stand_in.py\n")
    (tmp_path / "mpirun").chmod(0o755)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "1"}
    shell = subprocess.Popen(["bash", "-c", text], cwd=tmp_path, env=environ, stdout=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "ready").exists():
            assert shell.poll() is None
        shell.send_signal(10)
        assert shell.communicate(timeout=20)[0] == "told\n" and shell.returncode == 5
    finally:
        shell.kill()


def test_a_script_without_a_signal_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--launcher", "mpirun", "--signal", "", "python", "x.py")
    assert "trap" not in text and "MPIDDP" not in text and text.endswith("-x OMP_NUM_THREADS \\\n    python x.py\n")


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_the_examples_are_what_is_printed(capsys: pytest.CaptureFixture[str], launcher: str) -> None:
    text = (Path(__file__).parents[2] / "examples" / "slurm" / f"{launcher}.sbatch").read_text()
    note = text[text.index("\n#\n# Submit") : text.index("\n\nset -e")]
    command = shlex.split(note.partition("Printed by\n")[2].replace("# ", "").replace("\\\n", ""))
    assert command[:2] == ["mpiddp", "slurm"]
    assert printed(capsys, *command[2:]) == text.replace(note, "")
