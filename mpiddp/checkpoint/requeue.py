"""Putting a Slurm job back into the queue."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping

__all__ = ["job_id", "requeue"]

_TIMEOUT_S = 60.0


def job_id(environ: Mapping[str, str]) -> str | None:
    """The id by which ``scontrol`` knows this job, which is one of an array's tasks perhaps; None outside Slurm."""
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        return f"{array}_{task}"
    return environ.get("SLURM_JOB_ID") or None


def requeue(environ: Mapping[str, str]) -> str | None:
    """Have this job started again; what stood in the way, or None. The job's processes are ended soon after."""
    job = job_id(environ)
    if job is None:
        return "this is no Slurm job (SLURM_JOB_ID is not set)"
    command = ["scontrol", "requeue", job]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"`{' '.join(command)}` failed: {error}"
    if done.returncode:
        return f"`{' '.join(command)}` ended with {done.returncode}: {(done.stderr or done.stdout).strip()}"
    return None
