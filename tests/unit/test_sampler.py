"""ShardSampler without MPI: shards given by number."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import mpiddp
from mpiddp import ShardSampler

LENGTHS = st.integers(0, 60)
SIZES = st.integers(1, 9)
EPOCHS = st.integers(0, 3)


def shards(length: int, size: int, epoch: int = 0, **options: bool) -> list[list[int]]:
    samplers = [ShardSampler(length, seed=7, num_replicas=size, rank=rank, **options) for rank in range(size)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    ids = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(i) for i in ids]
    return ids


@given(LENGTHS, SIZES, EPOCHS, st.booleans())
def test_without_padding_every_id_occurs_once(length, size, epoch, shuffle):
    ids = shards(length, size, epoch, pad=False, shuffle=shuffle)
    assert sorted(i for shard in ids for i in shard) == list(range(length))
    assert max(map(len, ids)) - min(map(len, ids)) <= 1


@given(LENGTHS, SIZES, EPOCHS, st.booleans())
def test_with_padding_all_are_equally_long_and_cover_the_set(length, size, epoch, shuffle):
    ids = shards(length, size, epoch, shuffle=shuffle)
    assert len({len(shard) for shard in ids}) == 1
    flat = [i for shard in ids for i in shard]
    assert set(flat) == set(range(length))
    assert len(flat) - length < size


@given(LENGTHS, SIZES, st.booleans(), st.booleans())
def test_drop_last_repeats_none_and_leaves_out_less_than_one_each(length, size, pad, shuffle):
    ids = shards(length, size, pad=pad, drop_last=True, shuffle=shuffle)
    flat = [i for shard in ids for i in shard]
    assert len({len(shard) for shard in ids}) == 1
    assert len(set(flat)) == len(flat)
    assert length - len(flat) < size


@given(st.integers(1, 60), SIZES, EPOCHS, st.booleans(), st.booleans())
def test_the_ids_are_those_of_distributed_sampler(length, size, epoch, shuffle, drop_last):
    dataset = TensorDataset(torch.zeros(length))
    for rank, ours in enumerate(shards(length, size, epoch, shuffle=shuffle, drop_last=drop_last)):
        theirs = DistributedSampler(dataset, size, rank, shuffle=shuffle, seed=7, drop_last=drop_last)
        theirs.set_epoch(epoch)
        assert ours == list(theirs)


def test_an_epoch_has_an_order_of_its_own_and_gives_it_again():
    sampler = ShardSampler(100, num_replicas=1, rank=0)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] != orders[1]
    assert orders[0] == orders[2]


def test_another_seed_gives_another_order():
    assert list(ShardSampler(100, seed=1, num_replicas=1, rank=0)) != list(ShardSampler(100, num_replicas=1, rank=0))


def test_the_global_random_state_is_neither_read_nor_moved():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = list(ShardSampler(100, num_replicas=2, rank=1))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert list(ShardSampler(100, num_replicas=2, rank=1)) == first


def test_a_default_device_of_the_user_is_left_aside():
    torch.set_default_device("meta")
    try:
        ids = list(ShardSampler(10, num_replicas=1, rank=0))
    finally:
        torch.set_default_device(None)
    assert sorted(ids) == list(range(10))


def test_in_a_loader_a_data_set_that_grows_is_seen_whole():
    numbers = list(range(10))
    sampler = ShardSampler(numbers, shuffle=False, num_replicas=2, rank=1)
    loader = DataLoader(numbers, batch_size=3, sampler=sampler)
    assert [batch.tolist() for batch in loader] == [[1, 3, 5], [7, 9]]
    numbers += [10, 11]
    assert len(sampler) == 6
    assert list(sampler)[-1] == 11


def test_the_world_is_asked_for_late():
    sampler = ShardSampler(10)  # before init(): fine
    assert "a shard a rank" in repr(sampler)
    if mpiddp.is_initialized():
        pytest.skip("the world is there already")
    with pytest.raises(mpiddp.NotInitializedError, match="init"):
        len(sampler)
    with pytest.raises(mpiddp.NotInitializedError, match="init"):
        iter(sampler)


def test_who_forgets_set_epoch_is_told_once(monkeypatch):
    said = []
    monkeypatch.setattr(logging.getLogger("mpiddp"), "warning", said.append)
    for options in ({}, {"shuffle": False}):
        sampler = ShardSampler(10, num_replicas=2, rank=0, **options)
        for _ in range(3):
            list(sampler)
    followed = ShardSampler(10, num_replicas=2, rank=0)
    for epoch in range(3):
        followed.set_epoch(epoch)
        list(followed)
    assert len(said) == 1
    assert "call sampler.set_epoch(epoch)" in said[0]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"dataset": 10, "num_replicas": 2}, ValueError, "both or neither, not 2 and None"),
        ({"dataset": 10, "rank": 0}, ValueError, "both or neither"),
        ({"dataset": 10, "num_replicas": 2, "rank": 2}, ValueError, "between 0 and 1, not 2"),
        ({"dataset": 10, "num_replicas": 2, "rank": -1}, ValueError, "between 0 and 1, not -1"),
        ({"dataset": 10, "num_replicas": 0, "rank": 0}, ValueError, "at least 1, not 0"),
        ({"dataset": -1}, ValueError, "negative: -1"),
        ({"dataset": iter(())}, TypeError, "with a length"),
    ],
)
def test_unusable_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        ShardSampler(**arguments)


def test_repr():
    sampler = ShardSampler(10, seed=3, pad=False, num_replicas=2, rank=1)
    sampler.set_epoch(4)
    assert repr(sampler) == "<ShardSampler of 10 samples, shard 1 of 2, every id once, shuffled by seed 3, epoch 4>"


# -- going on in the middle of an epoch ----------------------------------------------------------------------------


def resumed(size: int, place: dict[str, int] | None = None, total: int = 50, **options: bool) -> list[ShardSampler]:
    """One sampler a rank, in epoch 2, or where ``place`` says."""
    samplers = [ShardSampler(total, num_replicas=size, rank=rank, **options) for rank in range(size)]
    for sampler in samplers:
        if place is not None:
            sampler.load_state_dict(place)
        sampler.set_epoch(2)
    return samplers


@pytest.mark.parametrize(("before", "after"), [(1, 3), (2, 2), (3, 4), (4, 1)])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_another_number_of_ranks_takes_exactly_what_is_left(before: int, after: int, steps: int) -> None:
    batch, taken = 4, []
    first = resumed(before, pad=False)
    for sampler in first:
        for _ in range(steps):
            sampler.record(batch)
        taken += list(sampler)[: steps * batch]
        assert len(sampler) == len(list(sampler)), "what a pass yields does not change in the midst of it"
    places = [sampler.state_dict() for sampler in first]
    assert places == [{"epoch": 2, "consumed": steps * batch * before}] * before
    second = resumed(after, places[0], pad=False)
    left = [index for sampler in second for index in sampler]
    assert sorted(taken + left) == list(range(50))
    assert second[0].next_epoch == 2 and second[0].progress == steps * batch * before / 50
    for sampler in second:
        sampler.set_epoch(3)
        assert sampler.consumed == 0
    assert sorted(index for sampler in second for index in sampler) == list(range(50))


def test_padding_and_dropping_apply_to_what_is_left() -> None:
    place = {"epoch": 2, "consumed": 33}  # of 50: 17 are left
    assert [len(list(sampler)) for sampler in resumed(4, place)] == [5] * 4
    assert [len(list(sampler)) for sampler in resumed(4, place, drop_last=True)] == [4] * 4
    whole = {index for sampler in resumed(4) for index in list(sampler)}
    assert whole == set(range(50))


def test_an_epoch_that_was_recorded_to_its_end_is_not_begun_again() -> None:
    (sampler,) = resumed(1)
    for _ in range(13):
        sampler.record(4)  # the last one is short, or padded
    place = sampler.state_dict()
    assert place == {"epoch": 2, "consumed": 50}
    (other,) = resumed(1, place)
    assert other.next_epoch == 3 and list(other) == []
    other.set_epoch(2)
    assert len(other) == 50, "on purpose once more"


@pytest.mark.parametrize("drop_last", [True, False])
def test_what_is_dropped_is_not_left(drop_last: bool) -> None:
    """Of 50, 4 ranks have 12 each, and nobody goes on with the last 2; else they are left."""
    (sampler, *_) = resumed(4, drop_last=drop_last)
    sampler.record(11)
    assert sampler.next_epoch == sampler.epoch
    sampler.record(1)
    assert sampler.next_epoch == sampler.epoch + drop_last
    assert len(resumed(4, sampler.state_dict(), drop_last=drop_last)[0]) == (0 if drop_last else 1)


def test_a_pass_whose_last_batch_the_loader_dropped_is_not_begun_again() -> None:
    """Of 10, 2 ranks have 5 each, and their loaders drop the fifth."""
    (sampler, _) = resumed(2, total=10)
    for (batch,) in DataLoader(TensorDataset(torch.arange(10)), batch_size=2, sampler=sampler, drop_last=True):
        sampler.record(len(batch))
    assert sampler.state_dict() == {"epoch": 2, "consumed": 8} and sampler.next_epoch == 2, "a short batch may be left"
    sampler.finish_epoch()
    assert sampler.next_epoch == 3 and sampler.progress == 1
    (other, *_) = resumed(3, sampler.state_dict(), total=10)
    assert other.next_epoch == 3 and list(other) == []
    other.set_epoch(3)
    assert len(other) == 4
