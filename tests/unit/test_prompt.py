"""A recipe does what a meeting does: with those who follow it too, and with those who meet the usual way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mpiddp.collectives import ReduceOp, mapped, shared_memory
from mpiddp.engine import Handle, Kind, Request, Signature, follow_at_once
from mpiddp.engine.prompt import Recipe
from mpiddp.transport.session import DONE, KEY
from tests.simulated_world import World

#: Where a tensor lies: in memory that the ranks share, in its own, or one way on even ranks and the other on odd ones.
WAYS = ("shared", "private", "mixed")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[World]]:
    """Worlds to be closed; what is longer than 16 elements is shown, in blocks of 32."""
    monkeypatch.setattr(Recipe, "looks", 1)  # nobody moves meanwhile
    monkeypatch.setattr(shared_memory, "DIRECT_NBYTES", 64)
    monkeypatch.setattr(mapped, "BLOCK_NBYTES", 128)
    worlds: list[World] = []
    yield worlds
    for world in worlds:
        world.close()


def _tensor(world: World, rank: int, way: str, values: torch.Tensor) -> torch.Tensor:
    is_shared = way == "shared" or (way == "mixed" and rank % 2 == 0)
    made = world.nodes[rank].memory.segments.empty(values.shape, values.dtype) if is_shared else values.clone()
    return made.copy_(values)


def _follow(world: World, rank: int, tensor: torch.Tensor, op: ReduceOp, scale: float) -> Handle:
    """As the second call of a kind does."""
    channel, engine = world.channels[rank], world.engines[rank]
    dtype = str(tensor.dtype).removeprefix("torch.")
    signature = Signature(int(Kind.ALLREDUCE), dtype, tuple(tensor.shape), int(op), scale=scale)
    kind = signature, tensor.data_ptr()
    recipe = channel.recipes.get(kind)
    if recipe is None:
        recipe = channel.recipes[kind] = Recipe(world.nodes[rank], signature, tensor.view(-1))
    awaited = follow_at_once(engine, channel, recipe, tensor, tensor)
    done = Request(0, signature, tensor, answer=tensor)
    done.finish(tensor)
    return awaited or done


def _expected(contributions: list[torch.Tensor], op: ReduceOp, scale: float) -> torch.Tensor:
    dtype = contributions[0].dtype
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    total = contributions[0].to(wide, copy=True)
    for contribution in contributions[1:]:
        op.combine(total, contribution.to(wide), total)
    return (total if scale == 1.0 else total.mul_(scale)).to(dtype)


@pytest.mark.parametrize("has_areas", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (1000,), (7, 11, 13)])
def test_it_is_the_reduction(opened: list[World], has_areas: bool, way: str, size: int, shape: tuple[int, ...]) -> None:
    for seed, (dtype, op, scale) in enumerate(
        [
            (torch.float32, ReduceOp.SUM, 1.0),
            (torch.float32, ReduceOp.SUM, 1 / size),
            (torch.float64, ReduceOp.MAX, 1.0),
            (torch.int64, ReduceOp.PRODUCT, 1.0),
            (torch.bfloat16, ReduceOp.SUM, 1.0),
            (torch.bfloat16, ReduceOp.SUM, 1 / size),
            (torch.float16, ReduceOp.MIN, 1.0),
            (torch.uint8, ReduceOp.MAX, 1.0),
        ]
    ):
        opened.append(world := World(size, seed, shares_memory=True, has_areas=has_areas))
        for round_ in range(4):
            given = [(torch.arange(1.0, 1 + max(1, torch.Size(shape).numel())) % 4 + r + round_) for r in range(size)]
            given = [each.to(dtype).view(shape) for each in given]
            tensors = [_tensor(world, rank, way, each) for rank, each in enumerate(given)]
            order = world.network.random.sample(range(size), size)
            handles = {rank: _follow(world, rank, tensors[rank], op, scale) for rank in order}
            world.run(list(handles.values()))
            expected = _expected(given, op, scale)
            assert all(handle.error is None for handle in handles.values())
            assert all(torch.equal(tensor, expected) for tensor in tensors), (dtype, op, round_)
        assert [channel.steps for channel in world.channels] == [4] * size
        assert not any(channel.pending for channel in world.channels)


def test_who_finds_everybody_there_is_done_at_once(opened: list[World]) -> None:
    opened.append(world := World(2, shares_memory=True, has_areas=True))
    tensors = [torch.full((5,), float(rank)) for rank in range(2)]
    first = _follow(world, 0, tensors[0], ReduceOp.SUM, 1.0)
    assert not first.done and len(world.channels[0].running) == 1
    assert _follow(world, 1, tensors[1], ReduceOp.SUM, 1.0).done and not world.channels[1].running
    world.run([first])
    assert tensors[0].tolist() == [1.0] * 5 and world.channels[0].unnamed == world.channels[1].unnamed == 1


def test_who_is_interrupted_has_published_nothing(opened: list[World], monkeypatch: pytest.MonkeyPatch) -> None:
    opened.append(world := World(2, shares_memory=True, has_areas=True))

    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(Recipe, "_have", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _follow(world, 0, torch.ones(3), ReduceOp.SUM, 1.0)
    node = world.nodes[0]
    at = node.meeting_slot(1).at
    assert not any(node.words[at + member * 16 + word] for member in range(2) for word in (KEY, DONE))
    assert not world.engines[0].is_pushing() and world.engines[0].inspect(lambda: True)
