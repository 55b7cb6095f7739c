"""Which GPU is whose: told by UUID, asked without harm."""

from __future__ import annotations

import ctypes
import itertools
import json
import random
import sys
import uuid
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mpiddp import gpus
from mpiddp.gpus import Gpu, Placement, Seen, choose, driver, sharing

A, B, C, D = "aaaa", "bbbb", "cccc", "dddd"
ALL = [A, B, C, D]


@pytest.mark.parametrize(
    ("visible", "chosen"),
    [
        pytest.param([ALL] * 4, [0, 1, 2, 3], id="all see all"),
        pytest.param([[A], [B], [C], [D]], [0, 0, 0, 0], id="each sees one of its own"),
        pytest.param([[D, A], [A, B], [B, C], [C, D]], [0, 0, 0, 0], id="each in an order of its own"),
        pytest.param([[A, B], [A, B], [C, D], [C, D]], [0, 1, 0, 1], id="a socket's GPUs"),
        pytest.param([[A, B]] * 5, [0, 1, 0, 1, 0], id="more ranks than GPUs: in turn"),
        pytest.param([[A, B], [A]], [1, 0], id="the first gives way"),
        pytest.param([[A, B], [B, C], [A], [B]], [1, 1, 0, 0], id="and who is asked gives way, too; B is shared"),
        pytest.param([[A], [A], [A, B], [A, B]], [0, 0, 1, 1], id="a free one is taken before one that is shared"),
        pytest.param([[], [A], []], [None, 0, None], id="some see none"),
        pytest.param([[], []], [None, None], id="no GPU"),
        pytest.param([[A]] * 3, [0, 0, 0], id="one for all"),
    ],
)
def test_a_gpu_for_each_rank(visible: list[list[str]], chosen: list[int | None]) -> None:
    assert choose(visible) == chosen


def test_the_local_rank_s_where_all_see_all() -> None:
    assert choose([ALL] * 4) == [0, 1, 2, 3] and choose([[A, B]] * 4) == [0, 1, 0, 1]


def test_no_choice_is_more_even() -> None:
    """Against all choices that there are, for ranks that see some GPUs each, drawn from a seed."""
    draw = random.Random(1)
    for _ in range(300):
        visible = [draw.sample(ALL[:3], draw.randint(1, 3)) for _ in range(draw.randint(1, 5))]
        best = min(loads(taken) for taken in itertools.product(*visible))
        assert loads([uuids[index or 0] for uuids, index in zip(visible, choose(visible), strict=True)]) == best, (
            visible
        )


def loads(taken: Sequence[str]) -> list[int]:
    """How many ranks each GPU has, the fullest first."""
    return sorted((list(taken).count(one) for one in ALL), reverse=True)


def test_who_shares() -> None:
    visible = [[A, B]] * 3
    assert sharing(visible, choose(visible)) == {A: [0, 2]}
    assert sharing([[A], [B]], [0, 0]) == {}, "two GPUs, though both are number 0"
    assert sharing([[], [A]], [None, 0]) == {}


class Node:
    """The ranks of a node, of which each sees what the others have said."""

    def __init__(self, rank: int, said: list[list[str]]) -> None:
        self.rank, self.said = rank, said

    def allgather(self, value: list[str]) -> list[list[str]]:
        assert value == self.said[self.rank]
        return self.said


def test_placement_is_agreed_and_sharing_said_once(caplog: pytest.LogCaptureFixture) -> None:
    seen = Seen((Gpu(A, "H100"), Gpu(B, "H100")))
    with caplog.at_level("WARNING", "mpiddp"):
        places = [gpus.place(Node(rank, [[A, B]] * 3), seen) for rank in range(3)]
    assert [p.index for p in places] == [0, 1, 0] and [p.users for p in places] == [(0, 2), (1,), (0, 2)]
    assert places[1].gpu == Gpu(B, "H100")
    assert [r.getMessage() for r in caplog.records] == [
        "on this node ranks share a GPU, and take turns on it: local ranks 0, 2 have GPU-aaaa"
    ]
    assert gpus.place(Node(0, [[]]), Seen(why="none")) == Placement(None, Seen(why="none"))


def answer_of(source: str, timeout_s: float = 20) -> Seen:
    return gpus.ask([sys.executable, "-I", "-S", "-c", source]).answer(timeout_s)


def test_the_driver_s_answer_is_read() -> None:
    said = {"gpus": [{"uuid": A, "name": "H100", "nbytes": 8, "pci": "0", "peers": [1]}], "why": ""}
    assert answer_of(f"print({json.dumps(json.dumps(said))})") == Seen((Gpu(A, "H100", 8, "0", (1,)),))


def test_a_driver_that_crashes_hangs_or_stammers_shows_nothing() -> None:
    assert answer_of("import os; os.kill(os.getpid(), 11)").why == "asking CUDA's driver ended with code -11"
    assert answer_of("print('{}')").why == "asking CUDA's driver ended with code 0"
    assert answer_of("import time; time.sleep(60)", 0.2).why == "CUDA's driver did not answer within 0.2 s"
    assert "cannot be asked" in gpus.ask(["/no/such/program"]).answer().why


def test_nobody_is_asked_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpiddp.gpus.visible.subprocess.Popen", lambda *a, **k: pytest.fail("a child was started"))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpus.ask().answer().why == "this PyTorch is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "no NVIDIA GPU" in gpus.ask(device_files=["/no/such/device"]).answer().why


class Driver:
    """Two GPUs; the first reaches the second."""

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 2
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = index + 10
        return 0

    def cuDeviceGetUuid_v2(self, found: Any, device: ctypes.c_int) -> int:  # noqa: N802
        found._obj[:] = bytes([device.value] * 16)
        return 0

    def cuDeviceGetName(self, found: Any, nbytes: int, device: ctypes.c_int) -> int:  # noqa: N802
        found.value = b"GPU"
        return 0

    def cuDeviceTotalMem_v2(self, found: Any, device: ctypes.c_int) -> int:  # noqa: N802
        found._obj.value = 1 << 30
        return 0

    def cuDeviceCanAccessPeer(self, found: Any, device: ctypes.c_int, peer: ctypes.c_int) -> int:  # noqa: N802
        found._obj.value = device.value < peer.value
        return 0


def test_what_the_driver_is_asked() -> None:
    first, second = driver.describe(Driver())
    assert first["uuid"] == str(uuid.UUID(bytes=bytes([10] * 16))) and first["nbytes"] == 1 << 30
    assert (first["name"], first["peers"], second["peers"]) == ("GPU", [1], [])


def test_a_driver_that_is_missing_or_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(driver.Refused, match="cannot be loaded"):
        driver.open_driver("libno-such-driver.so.1")
    with pytest.raises(driver.Refused, match="cuInit failed with code 803: the kernel's driver"):
        driver.checked(803, "cuInit")


def test_the_program_alone_answers_in_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    def refuse() -> Any:
        raise driver.Refused("cuInit failed with code 100")

    monkeypatch.setattr(driver, "open_driver", refuse)
    driver.main()
    assert json.loads(capsys.readouterr().out) == {"gpus": [], "why": "the driver shows no GPU to this process"}
