"""Settings. The only module that reads or writes ``os.environ``.

A :class:`Config` is built once by ``init()`` from the environment and never changes. An unknown ``MPIDDP_*`` variable
is an error, because a misspelt setting that is silently ignored costs a day on a cluster. ``HOROVOD_*`` variables
that mean something here are aliases; the others are ignored and can be listed with :func:`ignored_horovod`.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .errors import ConfigError

__all__ = ["VARIABLES", "Config", "Variable", "environ", "export", "ignored_horovod", "parse_signals", "remove"]

MIB = 1 << 20

#: Buckets within a host, where only the number of exchanges costs. Between hosts: see optimizer/network.py.
_BUCKET_MB = 25.0


@dataclasses.dataclass(frozen=True)
class Config:
    """What can be set. Units are in the names; ``agreed`` fields take rank 0's value on every rank."""

    bucket_mb: float | None = None
    first_bucket_mb: float = 1.0
    fusion_mb: float = 8.0
    heap_mb: float = 64.0
    segment_kb: int = 512
    algorithm: str = ""
    cuda_aware: bool | None = None
    local: str = "ipc"
    deterministic: bool = False
    fault_tolerant: bool = False
    progress_interval_ms: float = 5.0
    stall_warn_s: float = 60.0
    stall_abort_s: float = 0.0
    init_timeout_s: float = 60.0
    exit_timeout_s: float = 5.0
    timeline: str = ""
    timeline_mark_cycles: bool = False
    preempt_signal: str = "USR1"
    requeue: bool = False
    log_level: str = "INFO"

    #: Fields that may differ between ranks; all the others are agreed by init().
    LOCAL = frozenset({"log_level"})

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Config:
        """Read the settings from ``environ``; raise :class:`ConfigError` for an unknown or malformed one."""
        known = {v.name: v for v in VARIABLES}
        unknown = sorted(n for n in environ if n.startswith("MPIDDP_") and n not in known)
        if unknown:
            raise ConfigError(
                f"unknown setting {', '.join(unknown)}; the known ones are {', '.join(sorted(known))}. "
                "Unset it or correct its name"
            )
        values: dict[str, Any] = {}
        for variable in VARIABLES:
            for alias, scale in variable.aliases:
                # DYNAMIC: Horovod's word for a trace that the program itself starts.
                if environ.get(alias, "DYNAMIC") != "DYNAMIC" and variable.name not in environ:
                    values[variable.field] = variable.read(alias, environ[alias], scale)
            if variable.name in environ:
                values[variable.field] = variable.read(variable.name, environ[variable.name])
        unchecked = environ.get("HOROVOD_STALL_CHECK_DISABLE", "").strip().lower()
        if unchecked not in _FALSE and "MPIDDP_STALL_WARN_S" not in environ:
            values["stall_warn_s"] = 0.0
        return cls(**values)

    @property
    def bucket_nbytes(self) -> int:
        """The size that a gradient bucket is filled up to, in bytes, unless the network says another."""
        return int(MIB * (_BUCKET_MB if self.bucket_mb is None else self.bucket_mb))

    @property
    def first_bucket_nbytes(self) -> int:
        """The size of the first bucket, in bytes: small, so that the exchange begins early in backward."""
        return int(self.first_bucket_mb * MIB)

    @property
    def heap_nbytes(self) -> int:
        """What malloc is to keep of what gradients leave behind, in bytes."""
        return int(self.heap_mb * MIB)

    def agreed(self) -> dict[str, Any]:
        """The fields on which all ranks must hold rank 0's value."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in self.LOCAL}


@dataclasses.dataclass(frozen=True)
class Variable:
    """One environment variable: the field it sets, how it is read, and its Horovod aliases with a factor."""

    name: str
    field: str
    parse: Callable[[str], Any]
    meaning: str
    aliases: tuple[tuple[str, float], ...] = ()

    def read(self, name: str, text: str, scale: float = 1) -> Any:
        """``text`` (times ``scale``) as a value, or a :class:`ConfigError` that names the variable."""
        try:
            return self.parse(text if scale == 1 else repr(float(text) * scale))
        except ValueError as error:
            raise ConfigError(f"{name}={text!r} is not usable: {error}. It is: {self.meaning}") from None


def _number(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise ValueError(f"it must lie between {low:g} and {high:g}")
        return value

    return parse


def _whole(low: int, high: int) -> Callable[[str], int]:
    number = _number(low, high)

    def parse(text: str) -> int:
        number(text)
        return int(text)

    return parse


_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off", ""})


def _boolean(text: str) -> bool:
    lowered = text.strip().lower()
    if lowered in _TRUE:
        return True
    if lowered in _FALSE:
        return False
    raise ValueError("it must be 0 or 1")


def _one_of(*names: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        name = text.strip().lower()
        if name not in names:
            raise ValueError(f"it must be one of {', '.join(name for name in names if name)}")
        return name

    return parse


def parse_signals(text: str) -> str:
    """``sigusr1,15`` as ``USR1,TERM``. Raises ValueError for what no process can receive."""
    known = {str(number.value): number.name for number in signal.Signals}
    given = [name.strip().upper() for name in text.split(",") if name.strip()]
    names = [known.get(name, name).removeprefix("SIG") for name in given]
    for name in names:
        if f"SIG{name}" not in signal.Signals.__members__ or name in ("KILL", "STOP"):
            raise ValueError(f"{name} is no signal that a process can receive")
    return ",".join(names)


_LEVELS = {"TRACE": "DEBUG", "FATAL": "CRITICAL"} | {n: n for n in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")}


def _level(text: str) -> str:
    name = text.strip().upper()
    if name not in _LEVELS:
        raise ValueError(f"it must be one of {', '.join(sorted(_LEVELS))}")
    return _LEVELS[name]


VARIABLES: tuple[Variable, ...] = (
    Variable("MPIDDP_BUCKET_MB", "bucket_mb", _number(0, 1 << 20), "size of a gradient bucket in MiB; unset: to suit"),
    Variable("MPIDDP_FIRST_BUCKET_MB", "first_bucket_mb", _number(0, 1 << 20), "size of the first bucket in MiB"),
    Variable(
        "MPIDDP_FUSION_MB",
        "fusion_mb",
        _number(0, 1 << 20),
        "small requests are fused up to this many MiB; 0 fuses nothing",
        (("HOROVOD_FUSION_THRESHOLD", 1 / MIB),),
    ),
    Variable("MPIDDP_HEAP_MB", "heap_mb", _number(0, 2047), "freed memory that malloc keeps for gradients, in MiB"),
    Variable("MPIDDP_SEGMENT_KB", "segment_kb", _whole(1, 1 << 20), "pipelined piece of a ring's chunk in KiB"),
    Variable(
        "MPIDDP_ALGORITHM",
        "algorithm",
        _one_of("", "ring", "doubling", "shared_memory", "hierarchical", "ordered"),
        "the algorithm of all collectives that have it, for experiments; empty: the one that suits",
    ),
    Variable(
        "MPIDDP_DETERMINISTIC",
        "deterministic",
        _boolean,
        "1: reductions give the same bits whatever the sizes of buckets and the layout of ranks over nodes",
    ),
    Variable("MPIDDP_CUDA_AWARE", "cuda_aware", _boolean, "1: prepare MPI for device buffers, 0: never give it any"),
    Variable(
        "MPIDDP_LOCAL",
        "local",
        _one_of("ipc", "nccl"),
        "how the GPUs of a node reduce: by CUDA IPC, or by NCCL through cupy",
    ),
    Variable("MPIDDP_FAULT_TOLERANT", "fault_tolerant", _boolean, "1: prepare MPI for surviving the death of a rank"),
    Variable(
        "MPIDDP_PROGRESS_INTERVAL_MS",
        "progress_interval_ms",
        _number(0.1, 1e6),
        "the liveness thread pushes what nobody has pushed for this long, in ms",
    ),
    Variable(
        "MPIDDP_STALL_WARN_S",
        "stall_warn_s",
        _number(0, 1e9),
        "report what waits longer than this, in s; 0: never",
        (("HOROVOD_STALL_CHECK_TIME_SECONDS", 1),),
    ),
    Variable(
        "MPIDDP_STALL_ABORT_S",
        "stall_abort_s",
        _number(0, 1e9),
        "end the job when something waits longer than this, in s; 0: never",
        (("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", 1),),
    ),
    Variable(
        "MPIDDP_INIT_TIMEOUT_S",
        "init_timeout_s",
        _number(0, 1e9),
        "end the job when init() hears nothing of the other ranks for so long after MPI has started, in s; 0: never",
    ),
    Variable("MPIDDP_EXIT_TIMEOUT_S", "exit_timeout_s", _number(0, 1e9), "bound on waiting for peers at exit, in s"),
    Variable("MPIDDP_TIMELINE", "timeline", str, "write a Chrome trace to this file", (("HOROVOD_TIMELINE", 1),)),
    Variable(
        "MPIDDP_TIMELINE_MARK_CYCLES",
        "timeline_mark_cycles",
        _boolean,
        "1: mark the rounds of negotiation in the trace",
        (("HOROVOD_TIMELINE_MARK_CYCLES", 1),),
    ),
    Variable(
        "MPIDDP_PREEMPT_SIGNAL",
        "preempt_signal",
        parse_signals,
        "names of signals, with commas between, that announce the end of the job to mpiddp.checkpoint; empty: none",
    ),
    Variable("MPIDDP_REQUEUE", "requeue", _boolean, "1: a job that leaves at a signal requeues itself in Slurm"),
    Variable("MPIDDP_LOG_LEVEL", "log_level", _level, "level of the logger", (("HOROVOD_LOG_LEVEL", 1),)),
)


def ignored_horovod(environ: Mapping[str, str]) -> list[str]:
    """The ``HOROVOD_*`` variables in ``environ`` that have no meaning here."""
    used = {alias for v in VARIABLES for alias, _ in v.aliases} | {"HOROVOD_STALL_CHECK_DISABLE"}
    return sorted(n for n in environ if n.startswith("HOROVOD_") and n not in used)


def environ() -> Mapping[str, str]:
    """The process's environment, to be handed to those who look something up in it."""
    return os.environ


def export(settings: Mapping[str, str]) -> None:
    """Put ``settings`` into the environment, for libraries that are loaded later and for child processes."""
    os.environ.update(settings)


def remove(names: Iterable[str]) -> dict[str, str]:
    """Take ``names`` out of the environment; return those that were there."""
    return {name: os.environ.pop(name) for name in list(names) if name in os.environ}
