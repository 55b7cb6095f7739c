"""mean and ShardSampler on ranks: every sample counts once."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.ranks(1, 2, 3)


def test_it_is_no_mean_of_means(world):
    # Rank r counts r + 1 samples of value r; the mean of the ranks' means would be another number from two ranks on.
    rank, size = world.rank(), world.size()
    expected = sum(r * (r + 1) for r in range(size)) / sum(r + 1 for r in range(size))
    assert world.mean(rank * (rank + 1), rank + 1) == expected


def test_a_rank_may_have_counted_nothing(world):
    last = world.rank() == world.size() - 1
    assert world.mean(3 if last else 0, 4 if last else 0) == 0.75


@pytest.mark.parametrize("kind", [int, float, torch.tensor, lambda x: torch.tensor([[x]], dtype=torch.bfloat16)])
def test_numbers_and_tensors(world, kind):
    value = world.mean(kind(3), kind(4))
    assert isinstance(value, float)
    assert value == 0.75


def test_large_counts_are_exact(world):
    assert world.mean((1 << 40) + world.size(), 1 << 40) == 1 + world.size() / (1 << 40)


def test_a_tensor_with_a_gradient_is_taken_as_a_number(world):
    loss = torch.tensor(2.0, requires_grad=True) * 2
    assert world.mean(loss, 2) == 2.0


def test_nothing_counted_anywhere_raises_on_every_rank(world):
    with pytest.raises(ValueError, match=f"all {world.size()} ranks add up to 0"):
        world.mean(0.0, 0)
    assert world.mean(1, 1) == 1.0


def test_a_vector_is_refused_before_anything_is_sent(world):
    with pytest.raises(ValueError, match=r"total must be one number, not a tensor of shape \(2,\)"):
        world.mean(torch.zeros(2), 1)
    assert world.mean(1, 1) == 1.0


@pytest.mark.parametrize("length", [0, 1, 7, 10])
@pytest.mark.parametrize("epoch", [0, 1])
def test_the_shards_of_the_world_are_disjoint_and_cover_the_set(world, length, epoch):
    sampler = world.ShardSampler(length, seed=5, pad=False)
    sampler.set_epoch(epoch)
    everyone = world.allgather_object(list(sampler))
    assert len(everyone) == world.size()
    assert sorted(i for ids in everyone for i in ids) == list(range(length))


def test_padded_shards_are_equally_long(world):
    lengths = world.allgather_object(len(list(world.ShardSampler(10))))
    assert lengths == [-(-10 // world.size())] * world.size()
