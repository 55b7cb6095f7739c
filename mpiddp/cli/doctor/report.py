"""What the doctor writes: the facts in short, the findings with their cures; or all of it as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence

from .facts import Facts, Job, plain
from .finding import SEVERITIES, Finding, exit_code

__all__ = ["as_json", "as_text"]

_WIDTH = 110


def as_json(job: Job, findings: Sequence[Finding]) -> str:
    """One object: ``exit_code``, ``findings``, ``pairs``, ``ranks``."""
    found = {"exit_code": exit_code(findings), "findings": plain(list(findings)), "pairs": plain(job.pairs)}
    return json.dumps({**found, "stuck_in": job.stuck_in, "ranks": plain(job.ranks)}, indent=2)


def as_text(job: Job, findings: Sequence[Finding]) -> str:
    """For people."""
    lines = [*_job(job), *(line for ranks in job.nodes().values() for line in _node(ranks)), *_pairs(job), ""]
    for finding in findings:
        lines += _wrapped(f"{finding.severity}: ", f"{finding.what} [{finding.name}]")
        if finding.cure:
            lines += _wrapped("    cure: ", finding.cure)
    counts = [f"{n} {name}{'s' * (n > 1)}" for name in reversed(SEVERITIES) if (n := _count(findings, name))]
    lines.append(f"found: {', '.join(counts)}" if counts else "found nothing wrong")
    return "\n".join(lines)


def _count(findings: Sequence[Finding], severity: str) -> int:
    return sum(finding.severity == severity for finding in findings)


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def _job(job: Job) -> Iterator[str]:
    first = job.ranks[0]
    yield f"{len(job.ranks)} rank(s) on {len(job.nodes())} node(s), started by {_launcher(first)}"
    yield "versions: " + ", ".join(f"{name} {version}" for name, version in first.versions.items() if version)
    if first.library:
        layer = f", layer {first.pml}" if first.pml else ""
        yield f"MPI: {first.libmpi or first.library}{layer}, thread level {first.thread_level or 'unknown'}"
    if any(each.gpu.index is not None for each in job.ranks):
        answer = first.cuda_aware
        yield f"CUDA-aware: {'yes' if answer.yes else 'no'}, {answer.why}"


def _launcher(first: Facts) -> str:
    said = first.launch
    if said.kind == "none":
        return "no launcher"
    return f"{first.launcher_exe or said.kind} ({said.kind}, {said.size or 'unknown number of'} rank(s))"


def _node(ranks: list[Facts]) -> Iterator[str]:
    first = ranks[0]
    usable = first.cpus.cores(frozenset[int]().union(*(each.cpus.usable for each in ranks)))
    free = first.machine.shm_free_nbytes
    yield ""
    yield f"{first.host}: {usable} core(s), {_memory(ranks)}" + (
        f", {free >> 20} MiB free in /dev/shm" if free is not None else ", no /dev/shm"
    )
    networks = [f"{i.name} {i.address}" for i in first.machine.interfaces]
    fast = [f"{f.kind} {f.device}{'' if f.is_active else ' (not active)'}" for f in first.machine.fabrics]
    yield f"  network: {', '.join([*networks, *fast]) or 'none'}"
    yield "  limits: " + ", ".join(f"{n} {'none' if v is None else v}" for n, v in first.machine.limits.items())
    for each in ranks:
        gpu = each.gpu.gpu
        where = f"cuda:{each.gpu.index} {gpu.name} GPU-{gpu.uuid}" if gpu else f"no GPU ({each.gpu.seen.why})"
        cpus = ",".join(_runs(each.cpus.affinity))
        yield f"  rank {each.rank}: CPUs {cpus}, {each.cpus.threads} thread(s), {where.replace(' ()', '')}"


def _memory(ranks: list[Facts]) -> str:
    if len(ranks) == 1 or ranks[0].memory == "":
        return "no memory shared" if ranks[0].memory else "shared memory not looked at"
    return "no memory shared" if ranks[0].memory == "private" else f"memory shared by {ranks[0].memory}"


def _runs(cpus: frozenset[int]) -> Iterator[str]:
    """0-3, 8."""
    ordered = sorted(cpus)
    begin = 0
    for index, cpu in enumerate(ordered):
        if index + 1 == len(ordered) or ordered[index + 1] != cpu + 1:
            low = ordered[begin]
            yield str(low) if low == cpu else f"{low}-{cpu}"
            begin = index + 1


def _pairs(job: Job) -> Iterator[str]:
    with_gpus = any(pair.gpu_gigabytes_per_s is not None for pair in job.pairs)
    if job.pairs:
        yield ""
        yield f"  ranks      GB/s  8 bytes in us  {'GPUs GB/s  ' * with_gpus}way"
    for pair in job.pairs:
        ranks = f"{pair.ranks[0]} - {pair.ranks[1]}"
        gpu = f"{_figure(pair.gpu_gigabytes_per_s):>9s}  " * with_gpus
        yield f"  {ranks:8s} {_figure(pair.gigabytes_per_s):>6s} {_figure(pair.latency_us):>14s}  {gpu}{pair.way}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
