"""Shared memory within one process: who holds it, who finds it, and when it is given back."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mpiddp.memory.mapping import MemoryFiles, NamedFiles, SharedFiles, open_and_map, orders_writes
from mpiddp.memory.node import LOG_WORDS, NodeMemory
from mpiddp.memory.segments import Segments
from mpiddp.transport import node as node_module
from mpiddp.transport.node import Node
from mpiddp.transport.steps import drain
from tests.simulated_node import nodes

LARGE = 2 << 20  # elements of uint8: a segment of its own


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(params=["memory", "named"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SharedFiles]:
    yield MemoryFiles() if request.param == "memory" else NamedFiles("job", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def pair(files: SharedFiles) -> Iterator[tuple[NodeMemory, NodeMemory]]:
    """Two ranks of a node."""
    log = memoryview(bytearray(8 * LOG_WORDS * 2)).cast("q")
    both = NodeMemory(files, log, 0, 2), NodeMemory(files, log, 1, 2)
    yield both
    for memory in both:
        memory.close()


def seen_by(reader: NodeMemory, owner: NodeMemory, tensor: torch.Tensor) -> torch.Tensor:
    place = owner.segments.place(tensor)
    assert place is not None
    return reader.tensor(owner.rank, place, tensor.nbytes).view(tensor.dtype)


def test_a_peer_sees_what_the_owner_writes_and_the_other_way_round(pair: tuple[NodeMemory, NodeMemory]) -> None:
    owner, peer = pair
    for numel in (1, 100, LARGE):
        tensor = owner.segments.empty((numel,), torch.float32)
        assert not tensor.any()
        other = seen_by(peer, owner, tensor)
        tensor.fill_(3)
        assert (other == 3).all()
        other.fill_(4)
        assert (tensor == 4).all()
    del tensor


def test_views_are_found_and_other_tensors_are_not(pair: tuple[NodeMemory, NodeMemory]) -> None:
    owner, peer = pair
    tensor = owner.segments.empty((10, 20), torch.int32)
    tensor.copy_(torch.arange(200).view(10, 20))
    rows = tensor[3:5].view(-1)
    assert torch.equal(seen_by(peer, owner, rows), torch.arange(60, 100, dtype=torch.int32))
    assert owner.segments.place(tensor.clone()) is None
    assert owner.segments.place(torch.empty(0)) is None
    assert peer.segments.place(tensor) is None
    del tensor, rows


def test_small_tensors_share_a_segment_and_no_cache_line(files: SharedFiles) -> None:
    segments = Segments(files)
    before = descriptors()
    tensors = [segments.empty((100,), torch.uint8) for _ in range(50)]
    assert descriptors() <= before + 1
    places = [segments.place(tensor) for tensor in tensors]
    offsets = [place[4] for place in places if place is not None]
    assert len(offsets) == 50 and all(b - a == 128 for a, b in itertools.pairwise(offsets))
    segments.close()


def test_memory_is_given_back_with_the_last_view(pair: tuple[NodeMemory, NodeMemory]) -> None:
    owner, peer = pair
    before = descriptors()
    tensor = owner.segments.empty((LARGE,), torch.uint8)
    view = tensor[5:]
    seen_by(peer, owner, tensor)
    del tensor
    gc.collect()
    assert descriptors() == before + 1 and peer._mapped[0]
    del view
    gc.collect()
    assert descriptors() == before
    peer.drop_freed()
    assert not peer._mapped[0]


def test_a_peer_that_missed_much_forgets_all(pair: tuple[NodeMemory, NodeMemory]) -> None:
    owner, peer = pair
    kept = owner.segments.empty((LARGE,), torch.uint8)
    seen_by(peer, owner, kept)
    for _ in range(LOG_WORDS + 5):
        owner.segments.empty((LARGE,), torch.uint8)
    peer.drop_freed()
    assert not peer._mapped[0]
    kept.fill_(7)
    assert (seen_by(peer, owner, kept) == 7).all()
    del kept


def test_full_segments_go_when_all_in_them_is_gone(files: SharedFiles) -> None:
    segments = Segments(files)
    for _ in range(30):
        segments.empty((1 << 20,), torch.uint8)
    assert len(segments._open) == 1
    segments.close()


def test_content_outlives_the_end(pair: tuple[NodeMemory, NodeMemory]) -> None:
    owner, _ = pair
    tensor = owner.segments.empty((LARGE,), torch.uint8).fill_(9)
    small = owner.segments.empty((3,), torch.float64).fill_(8)
    owner.close()
    gc.collect()
    assert (tensor == 9).all() and (small == 8).all()
    assert owner.segments.place(tensor) is None
    assert (owner.segments.empty((3,), torch.float64) == 0).all()


def test_where_nothing_is_shared_there_is_ordinary_memory() -> None:
    alone = NodeMemory.alone()
    tensor = alone.segments.empty((2, 3), torch.bfloat16)
    assert tensor.shape == (2, 3) and tensor.dtype == torch.bfloat16 and alone.segments.place(tensor) is None
    assert not alone.is_shared


def test_out_of_descriptors_there_is_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: MemoryFiles, number: int, nbytes: int) -> int:
        raise OSError("too many open files")

    monkeypatch.setattr(MemoryFiles, "create", refuse)
    segments = Segments(MemoryFiles())
    assert segments.place(segments.empty((LARGE,), torch.uint8)) is None


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    with pytest.raises(OSError, match="holds 5 bytes, not 8"):
        open_and_map(str(tmp_path / "x"), 8)


def test_what_a_killed_job_left_is_removed_and_what_lives_is_not(tmp_path: Path) -> None:
    (tmp_path / "mpiddp-old-1-1").write_bytes(b"1")
    living = NamedFiles("first", tmp_path)
    fd = living.create(1, 4096)
    NamedFiles("second", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"mpiddp-first-{os.getpid()}-1"]
    os.close(fd)
    living.remove(1)


def test_a_forked_child_leaves_the_parents_memory_alone(pair: tuple[NodeMemory, NodeMemory]) -> None:
    owner, peer = pair
    tensor = owner.segments.empty((LARGE,), torch.uint8).fill_(1)
    child = os.fork()
    if not child:
        ordinary = owner.segments.place(owner.segments.empty((3,), torch.uint8)) is None
        del tensor
        gc.collect()
        os._exit(0 if ordinary else 1)
    assert os.waitpid(child, 0)[1] == 0
    peer.drop_freed()
    assert (seen_by(peer, owner, tensor) == 1).all()
    del tensor


def test_only_processors_that_order_writes_are_trusted() -> None:
    assert orders_writes("x86_64") and orders_writes("AMD64") and not orders_writes("aarch64")


def test_staging_buffers_are_used_again_once_all_have_ended() -> None:
    first, second = nodes(2)
    sessions = []

    def enter(node: Node):  # type: ignore[no-untyped-def]
        with (yield from node.enter(3)) as session:
            sessions.append(session)
            stages.append(session.stage(4096))
            yield None

    stages: list[torch.Tensor] = []
    steps = enter(first)
    next(steps)
    other = enter(second)
    next(other)
    drain(steps)
    assert first.take_stage(4096).data_ptr() != stages[0].data_ptr()  # the second has not ended
    drain(other)
    assert first.take_stage(4096).data_ptr() == stages[0].data_ptr()
    assert node_module.PAGE_NBYTES % 128 == 0
