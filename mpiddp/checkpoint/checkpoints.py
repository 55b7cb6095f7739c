"""Checkpoints: save and restore on all ranks together."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from .. import config, runtime
from ..errors import ArgumentError, CheckpointError, MpiddpError
from ..functions import allgather_object, broadcast_object
from ..log import logger
from . import random_state
from .directory import Directory, Draft, write_file
from .parts import Kept, kept
from .preemption import Agreement, Notice, held, unheard
from .requeue import requeue as requeue_job

__all__ = ["Checkpoints"]

_STATE = "state.pt"
#: Ranks that are named in an error; a thousand with a full disk should not fill the screen.
_PROBLEMS_SHOWN = 4


class Checkpoints:
    """The checkpoints of one job in one directory: ``Checkpoints(path, model=model, optimizer=optimizer, keep=3)``.

    Each keyword is a thing with ``state_dict()`` and ``load_state_dict()``: models, optimizers, GradScalers,
    schedulers, samplers. With them go each rank's random number generators. A checkpoint can be restored at any number
    of ranks; at the same number every rank gets its own generators back. To be made and called on all ranks.

    Args:
        path: a directory, on a file system that all ranks see, for this job alone. It is made when first needed.
        keep: so many checkpoints stay, the latest ones; those that :meth:`restore` found damaged go first.
        signals: names of the signals that make :meth:`preempted` true, such as ``"USR1"`` or ``["USR1", "TERM"]``;
            ``MPIDDP_PREEMPT_SIGNAL`` unless given. They are awaited from here on.
        requeue: whether :meth:`leave` puts the job back into Slurm's queue; ``MPIDDP_REQUEUE`` unless given.
        check_every: :meth:`preempted` asks the other ranks at each so many-th call; unless given, about twice a second.

    Raises:
        ArgumentError: unusable arguments. NotInitializedError: before ``mpiddp.init()``.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        keep: int = 3,
        signals: str | Sequence[str] | None = None,
        requeue: bool | None = None,
        check_every: int | None = None,
        **objects: Any,
    ) -> None:
        settings = runtime.current().config
        if keep < 1 or (check_every is not None and check_every < 1):
            raise ArgumentError(f"keep={keep} and check_every={check_every} must be at least 1")
        self.keep = keep
        #: The plain values that were given to :meth:`save`, after :meth:`restore`.
        self.values: dict[str, Any] = {}
        self._requeues = settings.requeue if requeue is None else requeue
        self._directory = Directory(Path(path))
        self._kept = kept(objects)
        self._notice = Notice(_numbers(settings.preempt_signal if signals is None else signals))
        self._agreement = Agreement(check_every)
        self._saved_step: int | None = None
        self._is_clean = False

    # -- save ----------------------------------------------------------------------------------------------------------

    def save(self, step: int, **values: Any) -> Path:
        """Write a checkpoint of ``step`` and of plain ``values``; return its path when it is on disk. Collective.

        Rank 0 writes all but the state of optimizers with ``shard=True``, of which each rank writes its part. Signals
        that would end a rank wait. Costs two small all-gathers and the writing, during which training stands still.

        Raises CheckpointError on every rank if one could not do its part; older checkpoints are as they were.
        """
        with held():
            draft: Draft | None = None
            problem, draft = _tried(lambda: self._begin(step) if runtime.rank() == 0 else None)
            noted, notes = _tried(lambda: [each.note() for each in self._kept])
            said = (step, notes, random_state.capture(), draft and draft.path, problem or noted)
            everyone = allgather_object(said, "checkpoint.begin")
            steps = {of: rank for rank, (of, *_) in enumerate(everyone)}
            if len(steps) > 1:
                self._fail(draft, step, [f"the ranks save different steps: {steps} (step: rank)"])
            self._fail(draft, step, [said[-1] for said in everyone])
            with runtime.current().engine.patient():  # all are here, and those that are done wait for those that write
                problem, mine = _tried(lambda: self._write(everyone, draft, values))
                everything = allgather_object((problem, mine), "checkpoint.written")
                self._fail(draft, step, [problem for problem, _ in everything])
                problem, final = _tried(lambda: self._commit(draft, everything) if draft is not None else None)
                problem, final = broadcast_object((problem, final), 0, "checkpoint.committed")
            self._fail(draft, step, [problem])
        self._saved_step = step
        logger.info("checkpoint of step %d written to %s", step, final)
        return Path(final)

    def _begin(self, step: int) -> Draft:
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ArgumentError(f"the step of a checkpoint is a whole number from 0 on, not {step!r}")
        if not self._is_clean:
            self._directory.clean()
            good = [stored for stored in self._directory.stored() if not self._directory.is_refused(stored)]
            later = [stored.path.name for stored in good if stored.step > step]
            if later:
                logger.warning(
                    "%s holds checkpoints of later steps than %d, which restore() will prefer: %s. Remove them, or "
                    "take another directory", self._directory.path, step, ", ".join(later),
                )  # fmt: skip
            self._is_clean = True
        return self._directory.begin(step)

    def _write(self, everyone: Sequence[Any], draft: Draft | None, values: dict[str, Any]) -> tuple[Any, Any]:
        folder = everyone[0][3]
        written, files = {}, {}
        for each in self._kept:
            written[each.name], added = each.write(folder)
            files.update(added)
        if draft is not None:
            notes = zip(*(notes for _, notes, *_ in everyone), strict=True)
            state = {each.name: each.state(said) for each, said in zip(self._kept, notes, strict=True)}
            random = [states for _, _, states, *_ in everyone]
            whole = {"step": draft.step, "values": values, "random": random, "state": state}
            files[_STATE] = write_file(draft.path / _STATE, lambda file: torch.save(whole, file))
        return written, files

    def _commit(self, draft: Draft, everything: Sequence[Any]) -> Path:
        files = {name: what for _, (_, named) in everything for name, what in named.items()}
        for each in self._kept:
            files.update(each.finish(draft.path, [written[each.name] for _, (written, _) in everything]))
        final = draft.commit(files, len(everything))
        self._directory.prune(self.keep, final)
        return final

    def _fail(self, draft: Draft | None, step: int, problems: Sequence[str | None]) -> None:
        named = [f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem]
        if not named:
            return
        if draft is not None:
            draft.discard()
        more = f" and {len(named) - _PROBLEMS_SHOWN} more ranks" if len(named) > _PROBLEMS_SHOWN else ""
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {self._directory.path}: "
            f"{'; '.join(named[:_PROBLEMS_SHOWN])}{more}"
        )

    # -- restore -------------------------------------------------------------------------------------------------------

    def restore(self) -> int:
        """Put everything back as the latest good checkpoint has it; return its step, 0 where there is none. Collective.

        Damaged checkpoints are passed over. Rank 0 reads (each file twice: once for its checksum), the others get all
        of it by MPI; :attr:`values` holds what was given to :meth:`save`. Things that are in the checkpoint and not in
        the script are left out. The files are unpickled, which runs code: only from a directory that you trust.

        Raises CheckpointError on every rank where the latest good one does not fit this script, where all are damaged,
        and where one that may be good cannot be read: the file system fails, or a newer version has written it.
        """
        allgather_object(None, "checkpoint.restoring")
        with runtime.current().engine.patient():  # all are here, and wait for who reads
            problem, header = _tried(self._load) if runtime.rank() == 0 else (None, None)
            problem, header = broadcast_object((problem, header), 0, "checkpoint.header")
            for each in self._kept if header is not None else []:
                each.share(header["sent"][each.name])
        if problem:
            raise CheckpointError(f"the checkpoint in {self._directory.path} could not be restored: rank 0: {problem}")
        if header is None:
            return 0
        self.values = header["values"]
        step, random, rank = int(header["step"]), header["random"], runtime.rank()
        if rank < len(random):
            random_state.install(random[rank])
        else:
            random_state.install_for_new_rank(rank, random[0])
        size = f", written by {len(random)} ranks" if len(random) != runtime.size() else ""
        logger.info("going on from step %d of %s%s", step, header["path"], size)
        return step

    def _load(self) -> dict[str, Any] | None:
        stored = self._directory.latest()
        if stored is None:
            return None
        whole = torch.load(stored.path / _STATE, map_location="cpu", weights_only=False)
        there, wanted = whole.pop("state"), [each.name for each in self._kept]
        if missing := [name for name in wanted if name not in there]:
            raise CheckpointError(f"{stored.path} holds {', '.join(there)}, and not {', '.join(missing)}")
        sent = {each.name: _load_one(each, there[each.name], stored.path) for each in self._kept}
        return {**whole, "sent": sent, "path": str(stored.path)}

    # -- the end of the job --------------------------------------------------------------------------------------------

    def preempted(self) -> bool:
        """Whether the job is to end: the signal has come to any rank. To be called on all ranks after each step.

        All ranks get the same answer at the same call, about half a second and a step after the signal. It does not
        wait for them: now and then a call starts an all-reduce of 16 bytes, of which the next call has the answer.
        """
        return self._agreement.any(self._notice.has_come)

    def leave(self, step: int, exit_code: int = 0, **values: Any) -> NoReturn:
        """:meth:`save` unless ``step`` is saved already, requeue the job if it is to be, and exit. Collective.

        Exits with ``exit_code``; with 1 where the job should have been requeued and could not be. Signals that come
        now change nothing any more.
        """
        with held(then_ignored=True):
            if self._saved_step != step:
                self.save(step, **values)
            problem = None
            with runtime.current().engine.patient():  # Slurm may take its time
                if self._requeues and runtime.rank() == 0:
                    with unheard(self._notice.signals):
                        problem = requeue_job(config.environ())
                    if problem:
                        logger.error("the job should have been requeued: %s", problem)
                problem = broadcast_object(problem, 0, "checkpoint.requeued")
            logger.info("leaving after step %d%s", step, ", requeued" if self._requeues and not problem else "")
        raise SystemExit(1 if problem else exit_code)

    def __repr__(self) -> str:
        names = ", ".join(each.name for each in self._kept)
        return f"<Checkpoints of {names} in {self._directory.path}, the last {self.keep}>"


def _tried(act: Callable[[], Any]) -> tuple[str | None, Any]:
    """What ``act`` returns; or what went wrong, for all ranks to know: none may be left waiting for this one."""
    try:
        return None, act()
    except Exception as error:  # of the disk, of a state_dict() of the user's
        logger.debug("a checkpoint failed", exc_info=True)
        return str(error) if isinstance(error, MpiddpError) else f"{type(error).__name__}: {error}", None


def _load_one(each: Kept, state: Any, folder: Path) -> Any:
    try:
        return each.load(state, folder)
    except Exception as error:
        raise CheckpointError(f"{each.name} of {folder} does not fit: {type(error).__name__}: {error}") from error


def _numbers(names: str | Sequence[str]) -> list[signal.Signals]:
    listed = names.split(",") if isinstance(names, str) else list(names)
    found = []
    for name in (name.strip().upper().removeprefix("SIG") for name in listed):
        if name and f"SIG{name}" not in signal.Signals.__members__:
            raise ArgumentError(f"signals={names!r}: there is no signal SIG{name}")
        if name:
            found.append(signal.Signals[f"SIG{name}"])
    return found
