"""Checkpoints on disk, their parts, the generators, the signals: all that needs no MPI."""

from __future__ import annotations

import errno
import faulthandler
import itertools
import logging
import math
import os
import random
import signal
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpiddp.checkpoint import preemption, random_state, requeue
from mpiddp.checkpoint.boxes import boxes
from mpiddp.checkpoint.directory import Directory, write_file
from mpiddp.checkpoint.parts import kept
from mpiddp.checkpoint.preemption import Notice, held, unheard
from mpiddp.errors import ArgumentError, CheckpointError

KILLS = 50


def store(directory: Directory, step: int, numel: int = 100, keep: int = 3) -> Path:
    """One checkpoint, as a rank that is alone writes it."""
    draft = directory.begin(step)
    state = {"step": step, "weights": torch.full((numel,), float(step))}
    files = {"state.pt": write_file(draft.path / "state.pt", lambda file: torch.save(state, file))}
    final = draft.commit(files, 1)
    directory.prune(keep, final)
    return final


def names(directory: Directory) -> list[str]:
    return [stored.path.name for stored in directory.stored()]


def test_the_last_ones_are_kept_and_the_latest_is_found(tmp_path: Path) -> None:
    directory = Directory(tmp_path / "a" / "b")
    assert directory.latest() is None and directory.stored() == []
    for step in (1, 2, 10, 20):
        store(directory, step)
    assert names(directory) == ["step-00000002", "step-00000010", "step-00000020"]
    latest = directory.latest()
    assert latest is not None and latest.step == 20 and latest.manifest()["size"] == 1
    assert sorted(path.name for path in directory.path.iterdir()) == names(directory), "nothing else is left"


def test_a_step_that_is_saved_again_does_not_touch_the_first(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    for _ in range(3):
        store(directory, 5)
    assert names(directory) == ["step-00000005", "step-00000005.1", "step-00000005.2"]
    assert str(store(directory, 5, keep=1)).endswith(".3") and names(directory) == ["step-00000005.3"]


def test_what_was_just_written_stays_though_later_steps_are_there(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    for step in (100, 200, 50):
        store(directory, step, keep=2)
    assert names(directory) == ["step-00000050", "step-00000200"]


def cut_short(path: Path) -> None:
    os.truncate(path / "state.pt", 100)


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "state.pt").write_bytes(data)


def lose_a_file(path: Path) -> None:
    (path / "state.pt").unlink()


def lose_the_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"format": 1, "fi')


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_short, "100 bytes in place of"),
        (flip_a_bit, "checksum"),
        (lose_a_file, "cannot be read"),
        (lose_the_manifest, "manifest.json cannot be read"),
    ],
)
def test_a_damaged_one_is_passed_over_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, damage: Any, words: str
) -> None:
    monkeypatch.setattr(logging.getLogger("mpiddp"), "propagate", True)
    directory = Directory(tmp_path)
    store(directory, 1)
    damage(store(directory, 2))
    with caplog.at_level("WARNING"):
        for _ in range(2):
            latest = directory.latest()
            assert latest is not None and latest.step == 1
    assert len(caplog.records) == 1 and "step-00000002" in caplog.text and words in caplog.text


def test_damaged_ones_go_before_good_ones(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    for step in (1000, 2000, 3000):
        path = store(directory, step)
        if step > 1000:
            cut_short(path)
    latest = directory.latest()
    assert latest is not None and latest.step == 1000
    store(directory, 1100)
    assert names(directory) == ["step-00001000", "step-00001100", "step-00003000"]
    store(directory, 1200)
    assert names(directory) == ["step-00001000", "step-00001100", "step-00001200"]


def test_where_all_are_damaged_nothing_begins_anew(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    for step in (1, 2):
        flip_a_bit(store(directory, step))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"are damaged \(2\): to begin anew"):
            directory.latest()


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("name", ["manifest.json", "state.pt"])
def test_what_may_be_whole_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, name: str
) -> None:
    directory = Directory(tmp_path)
    for step in (1, 2):
        store(directory, step)
    really = Path.open

    def fails(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == name:
            raise OSError(number, os.strerror(number))
        return really(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fails)
        patch.setattr(Path, "read_text", lambda path: fails(path).read())
        with pytest.raises(CheckpointError, match=f"step-00000002 cannot be read.*{os.strerror(number)}"):
            directory.latest()
    latest = directory.latest()
    assert latest is not None and latest.step == 2


def test_what_a_newer_version_has_written_is_not_passed_over(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    store(directory, 1)
    (store(directory, 2) / "manifest.json").write_text('{"format": 2, "parts": []}')
    with pytest.raises(CheckpointError, match="step-00000002 has format 2, and this version reads up to 1"):
        directory.latest()


def test_a_file_that_rank_0_does_not_see_is_an_error(tmp_path: Path) -> None:
    draft = Directory(tmp_path).begin(3)
    with pytest.raises(CheckpointError, match=r"elsewhere\.pt .* is not there .* file system that all ranks share"):
        draft.commit({"elsewhere.pt": (10, 0)}, 2)
    draft.discard()
    assert list(tmp_path.iterdir()) == []


def save_until_killed(path: Path, first: int, pipe: int) -> None:
    """In a forked child: save step after step, and tell of each when it is done."""
    directory = Directory(path)
    for step in range(first, first + 10**6):
        store(directory, step, numel=20_000, keep=2)
        os.write(pipe, struct.pack("q", step))


def test_killed_at_any_moment_there_is_always_a_good_latest_one(tmp_path: Path) -> None:
    """kill -9 at 50 random moments: what was reported as written is there and good, and nothing is passed over."""
    moments = random.Random(0)
    directory = Directory(tmp_path)
    store(directory, 0)
    step, drafts = 0, 0
    for _ in range(KILLS):
        receiving, sending = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                save_until_killed(tmp_path, step + 1, sending)
            finally:
                os._exit(1)
        os.close(sending)
        for _ in range(moments.randrange(3)):
            step = struct.unpack("q", os.read(receiving, 8))[0]
        time.sleep(moments.uniform(0, 0.006))  # any moment will do
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while told := os.read(receiving, 8):
            step = struct.unpack("q", told)[0]
        os.close(receiving)
        latest = Directory(tmp_path).latest()
        assert latest is not None and latest == directory.stored()[-1], "the newest is whole"
        assert latest.step in (step, step + 1), "at most one more than was reported"
        state = torch.load(latest.path / "state.pt")
        assert state["step"] == latest.step and torch.all(state["weights"] == latest.step)
        step = latest.step
        drafts += len(list(tmp_path.glob(".step-*")))
        directory.clean()
    assert drafts > KILLS // 4, "the kills came in the midst of writing"
    assert all(path.name.startswith("step-") for path in tmp_path.iterdir())


# -- boxes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(()),
        torch.zeros(7),
        torch.zeros(3, 5),
        torch.zeros(4, 1, 3),
        torch.zeros(2, 3, 4, 5),
        torch.zeros(5, 7).t(),
        torch.zeros(4, 3, 3, 2).to(memory_format=torch.channels_last),
    ],
    ids=lambda tensor: str(tuple(tensor.shape)),
)
def test_ranges_become_boxes_that_cover_each_element_once(tensor: torch.Tensor) -> None:
    numel = tensor.numel()
    flat = torch.arange(1.0, numel + 1)
    tensor.as_strided((numel,), (1,)).copy_(flat)
    cuts = [0, *sorted(random.Random(numel).sample(range(numel + 1), min(3, numel))), numel]
    found = torch.zeros(tensor.shape)
    for lo, hi in itertools.pairwise(cuts):
        cut = boxes(tensor.shape, tensor.stride(), lo, hi)
        assert len(cut) <= max(1, 2 * tensor.dim() - 1) and sum(math.prod(box.sizes) for box in cut) == hi - lo
        for box in cut:
            part = found[tuple(slice(at, at + length) for at, length in zip(box.offsets, box.sizes, strict=True))]
            assert torch.all(part == 0)
            part.copy_(box.of(flat[box.lo : box.hi]))
    assert torch.equal(found, tensor)


# -- generators ----------------------------------------------------------------------------------------------------


def drawn() -> tuple[float, float, float, float]:
    return random.random(), float(np.random.rand()), float(np.random.randn()), torch.rand(1).item()


def test_generators_go_on() -> None:
    drawn()
    states = random_state.capture()
    first = drawn()
    assert drawn() != first
    random_state.install(states)
    assert drawn() == first


def test_ranks_that_are_new_draw_numbers_of_their_own() -> None:
    states = random_state.capture()
    seen = []
    for rank in (4, 5, 4):
        random_state.install_for_new_rank(rank, states)
        seen.append(drawn())
    assert seen[0] == seen[2] != seen[1]


# -- signals -------------------------------------------------------------------------------------------------------


@pytest.fixture
def handlers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts the handlers back, and forgets what has come."""
    monkeypatch.setattr(preemption, "_came", set())
    monkeypatch.setenv("_MPIDDP_SIGNALS", "")
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_is_noted_and_a_worker_does_not_die_of_it(handlers: None) -> None:
    notice = Notice([signal.SIGUSR1, signal.SIGTERM])
    assert not notice.has_come
    for number, status in ((signal.SIGUSR1, 0), (signal.SIGTERM, signal.SIGTERM)):
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), number)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == status
    assert not notice.has_come
    os.kill(os.getpid(), signal.SIGUSR1)
    assert notice.has_come


def test_a_signal_has_come_for_all_that_await_it(handlers: None) -> None:
    first, second = Notice([signal.SIGUSR1]), Notice([signal.SIGUSR2, signal.SIGUSR1])
    third = Notice([signal.SIGUSR2])
    os.kill(os.getpid(), signal.SIGUSR1)
    assert first.has_come and second.has_come and not third.has_come
    assert Notice([signal.SIGUSR1]).has_come, "one that is made later, too"


def test_signals_wait_while_held(handlers: None) -> None:
    came: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: came.append(number))
    with held():
        with held():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        assert came == []
    assert came == [signal.SIGTERM]
    with held(then_ignored=True):
        os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert came == [signal.SIGTERM], "neither the one that waited nor a later one"


def test_a_handler_that_was_set_from_c_stays(handlers: None, tmp_path: Path) -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    with (tmp_path / "stacks").open("w") as file:
        faulthandler.register(signal.SIGUSR2, file)
        try:
            for then_ignored in (False, True):
                with held(then_ignored):
                    os.kill(os.getpid(), signal.SIGUSR2)
                os.kill(os.getpid(), signal.SIGUSR2)  # it was deadly, or nothing
        finally:
            faulthandler.unregister(signal.SIGUSR2)
    assert (tmp_path / "stacks").read_text().count("in test_a_handler_that_was_set_from_c_stays") == 4


@pytest.mark.parametrize("command", [["sleep", "0.3"], ["sh", "-c", "sleep 0.3; exit 0"]], ids=["program", "shell"])
def test_a_program_does_not_hear_what_the_rank_awaits(handlers: None, command: list[str]) -> None:
    came: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: came.append(number))
    with unheard([signal.SIGALRM]):
        child = subprocess.Popen(command)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGALRM):
            time.sleep(0.05)  # the shell unblocks what is blocked, and not at once
            child.send_signal(number)
        assert child.wait() == 0
        os.kill(os.getpid(), signal.SIGUSR1)
    assert came == []
    os.kill(os.getpid(), signal.SIGUSR1)
    assert came == [signal.SIGUSR1]


def test_the_job_s_id() -> None:
    assert requeue.job_id({}) is None
    assert requeue.job_id({"SLURM_JOB_ID": "17"}) == "17"
    assert requeue.job_id({"SLURM_JOB_ID": "19", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2"}) == "17_2"


def test_why_a_job_was_not_requeued(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no Slurm job" in str(requeue.requeue({}))
    answers: list[Any] = [OSError("no such file: scontrol"), (1, "Requeue not allowed"), (0, "")]
    asked = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return subprocess.CompletedProcess(command, answer[0], "", answer[1])

    monkeypatch.setattr(requeue.subprocess, "run", run)
    job = {"SLURM_JOB_ID": "17"}
    assert "no such file" in str(requeue.requeue(job))
    assert "ended with 1: Requeue not allowed" in str(requeue.requeue(job))
    assert requeue.requeue(job) is None and asked == [["scontrol", "requeue", "17"]] * 3


def test_only_things_with_a_state_are_kept() -> None:
    model = torch.nn.Linear(1, 1)
    found = kept({"model": model, "mine": torch.optim.SGD(model.parameters())})
    assert [each.name for each in found] == ["model", "mine"]
    with pytest.raises(ArgumentError, match=r"best= of a checkpoint is a float.*give plain values to save"):
        kept({"best": 0.5})
