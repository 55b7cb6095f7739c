"""Elastic state and its loop: commit, restore, synchronise, share out anew; which failures are survived."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.ranks(1, 2, 3)


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def assert_equal_everywhere(world: Any, values: Any) -> None:
    everyone = world.allgather_object(values)
    assert all(other == everyone[0] for other in everyone), everyone


def numbers(module: nn.Module) -> list[float]:
    return torch.cat([value.double().reshape(-1) for value in module.state_dict().values()]).tolist()


def train_a_step(model: nn.Module, optimizer: Any, seed: int) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
    optimizer.step()


# -- the state -----------------------------------------------------------------------------------------------------


def test_restore_undoes_what_came_after_the_commit(world: Any) -> None:
    model = net(0)
    optimizer = world.DistributedOptimizer(torch.optim.Adam(model.parameters()), model.named_parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    state = world.elastic.TorchState(model, optimizer, schedule=schedule, epoch=3, losses=[1.0], best={"loss": [2.0]})
    assert state.model is model and state.optimizer is optimizer and state.epoch == 3
    train_a_step(model, optimizer, 1)
    schedule.step()
    state.commit()
    before = numbers(model), copy.deepcopy(optimizer.state_dict()), schedule.state_dict()["last_epoch"]
    for attempt in range(2):
        train_a_step(model, optimizer, 2 + attempt)
        schedule.step()
        state.epoch += 1
        state.losses.append(5.0)
        state.best["loss"][0] = 7.0
        assert numbers(model) != before[0]
        state.restore()
        assert state.epoch == 3 and state.losses == [1.0] and state.best == {"loss": [2.0]}
        assert numbers(model) == before[0] and schedule.state_dict()["last_epoch"] == before[2]
        torch.testing.assert_close(optimizer.state_dict(), before[1])


def test_sync_takes_rank_zeros_values_and_keeps_the_objects(world: Any) -> None:
    rank = world.rank()
    model = net(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * (rank + 1), momentum=0.9)
    train_a_step(model, optimizer, rank)
    other = net(rank + 10)
    state = world.elastic.TorchState(model=model, optimizer=optimizer, other=other, epoch=rank, names=[rank])
    state.sync()
    assert state.model is model and state.optimizer is optimizer and state.other is other
    assert state.epoch == 0 and state.names == [0] and optimizer.param_groups[0]["lr"] == 0.1
    momenta = [s["momentum_buffer"].tolist() for s in optimizer.state_dict()["state"].values()]
    assert_equal_everywhere(world, (numbers(model), numbers(other), momenta))
    state.epoch = 9
    state.restore()  # what was synchronised is saved
    assert state.epoch == 0


def test_a_state_with_nothing_but_objects_and_a_loop_variable(world: Any) -> None:
    state = world.elastic.ObjectState(batch=0, history=[])
    for state.batch in range(3):
        state.history.append(state.batch)
    assert state.batch == 2 and state.history == [0, 1, 2]
    state.commit()
    for name in ("commit", "_x", "commits"):
        with pytest.raises(ValueError, match=name):
            world.elastic.ObjectState(**{name: 1})
    with pytest.raises(TypeError, match="'stream'"):
        world.elastic.ObjectState(stream=(number for number in range(3)))


def test_another_model_in_the_place_of_the_first(world: Any) -> None:
    state = world.elastic.TorchState(model=net(world.rank()))
    state.model = replacement = net(world.rank() + 5)
    state.sync()
    assert state.model is replacement
    assert_equal_everywhere(world, numbers(replacement))
    with pytest.raises(TypeError, match="model"):
        state.model = 3


def test_commit_raises_everywhere_when_one_rank_was_told_of_new_hosts(world: Any) -> None:
    last = world.size() - 1
    for update, skip in ((2, False), (1, True), (3, False)):
        state = world.elastic.ObjectState(epoch=0)
        state.commit()
        if world.rank() == last:
            state.on_hosts_updated(1.0, update)
            state.on_hosts_updated(1.0, update)
        state.epoch = 4
        with pytest.raises(world.elastic.HostsUpdatedInterrupt) as caught:
            state.commit()
        assert caught.value.skip_sync is skip
        state.epoch = 5
        state.restore()
        assert state.epoch == 4
        state.check_host_updates()  # it was told once


# -- the sampler ---------------------------------------------------------------------------------------------------


def everyones(world: Any, ids: list[int]) -> list[int]:
    return sorted(i for part in world.allgather_object(ids) for i in part)


@pytest.mark.parametrize("shuffle", [False, True])
def test_each_id_once_an_epoch(world: Any, shuffle: bool) -> None:
    size = world.size()
    sampler = world.elastic.ElasticSampler(range(6 * size), shuffle=shuffle, seed=3)
    first = list(sampler)
    assert len(sampler) == 6 and everyones(world, first) == list(range(6 * size))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert (list(sampler) != first) is (shuffle and 6 * size > 1)
    assert everyones(world, list(sampler)) == list(range(6 * size))
    assert first == sorted(first) or shuffle
    assert "ElasticSampler" in repr(sampler)


def test_ids_are_repeated_where_they_do_not_divide(world: Any) -> None:
    size = world.size()
    sampler = world.elastic.ElasticSampler(1, shuffle=False)
    assert list(sampler) == [0]
    sampler = world.elastic.ElasticSampler(2 * size + 1)
    assert len(list(sampler)) == len(sampler) == 3
    assert set(everyones(world, list(sampler))) == set(range(2 * size + 1))
    assert list(world.elastic.ElasticSampler(0)) == []


def test_after_a_reset_what_is_left_is_shared_out(world: Any) -> None:
    size = world.size()
    total = 10 * size
    sampler = world.elastic.ElasticSampler(total, seed=1)
    taken = [list(sampler)[:2], list(sampler)[2:4]]
    assert sampler.get_indices(1, 2) == taken[1]
    sampler.record_batch(0, 2)
    sampler.record_batch(1, 2)
    done = set(everyones(world, taken[0] + taken[1]))
    assert sampler.processed_indices == done and sampler.processed_num == 4 * size
    sampler.reset()
    rest = everyones(world, list(sampler))
    assert sorted(rest + sorted(done)) == list(range(total)) and len(sampler) == 6
    assert sorted(sampler.remaining_indices) == rest
    kept = copy.deepcopy(sampler.state_dict())
    sampler.record_batch(0, 100)  # beyond the end
    sampler.reset()
    assert list(sampler) == [] and len(sampler) == 0
    again = world.elastic.ElasticSampler(total, seed=1)
    again.load_state_dict(kept)
    assert everyones(world, list(again)) == rest
    again.set_epoch(1)
    assert len(again) == 10 and again.processed_indices == set()


def test_what_each_rank_recorded_by_index_counts_on_all(world: Any) -> None:
    size, rank = world.size(), world.rank()
    total = 8 * size
    sampler = world.elastic.ElasticSampler(total, seed=2)
    state = world.elastic.TorchState(sampler=sampler)
    sampler.record_batch(0, 2)  # in step first
    done = set(sampler.processed_indices)
    own = list(sampler)[1 : 4 + rank]  # then not; one of them was in that batch
    sampler.record_indices(own)
    everything = done | set(everyones(world, own))
    state.commit()
    sampler.record_indices(list(sampler))
    state.restore()
    assert sampler.processed_indices == everything
    assert sorted(set(everyones(world, list(sampler)))) == sorted(set(range(total)) - everything)
    if rank == 0:
        sampler.record_indices(sampler.get_indices(0, 1))
        everything |= {sampler.get_indices(0, 1)[0]}
    everything = set(world.broadcast_object(everything))
    state.sync()
    assert sampler.processed_indices == everything
    sampler.record_batch(0, 1)
    state.reset()
    assert len(sampler.processed_indices) == min(total, len(everything) + size)
    assert_equal_everywhere(world, (sorted(sampler.processed_indices), sorted(sampler.remaining_indices)))
    with pytest.raises(ValueError, match="none of index"):
        sampler.record_indices([total])


def test_the_sampler_in_a_data_loader(world: Any) -> None:
    sampler = world.elastic.ElasticSampler(12 * world.size())
    data = torch.utils.data.TensorDataset(torch.arange(12 * world.size()))
    loader = torch.utils.data.DataLoader(data, batch_size=4, sampler=sampler)
    assert len(loader) == 3
    seen: list[int] = []
    for number, (rows,) in enumerate(loader):
        seen += rows.tolist()
        sampler.record_batch(number, 4)
        if number == 1:
            break
    sampler.reset()
    seen += [row for (rows,) in loader for row in rows.tolist()]
    assert everyones(world, seen) == list(range(12 * world.size()))


# -- the loop ------------------------------------------------------------------------------------------------------


def disagree(world: Any, name: str) -> None:
    """Raises MismatchError on all ranks; in a world of one by other means."""
    if world.size() == 1:
        raise world.HorovodInternalError(f"{name}: pretended")
    world.allreduce(torch.ones(1 + world.rank()), name=name)


def test_it_goes_on_from_the_last_commit_after_a_failure(world: Any) -> None:
    model = net(world.rank())
    optimizer = world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model.named_parameters())
    sampler = world.elastic.ElasticSampler(8 * world.size())
    state = world.elastic.TorchState(model, optimizer, sampler=sampler, step=0)
    events: list[Any] = []
    seen: list[int] = []
    state.register_reset_callbacks([lambda: events.append(("reset", state.step)), lambda: events.append("again")])

    @world.elastic.run
    def train(state: Any, factor: int, *, offset: int = 0) -> str:
        events.append(("begin", state.step, len(sampler)))
        del seen[state.step :]
        for index in sampler.indices:
            seen.append(index)
            train_a_step(model, optimizer, state.step)
            state.step += 1
            sampler.record_batch(0, 1)
            if state.step in (3, 6) and ("failed", state.step) not in events:
                events.append(("failed", state.step))
                disagree(world, "loss")
            if state.step % 2 == 0:
                state.commit()
        return f"{factor * state.step + offset}"

    assert train.__name__ == "train"
    assert train(state, 10, offset=1) == "81"
    assert events == [
        ("begin", 0, 8), ("failed", 3), ("reset", 2), "again",
        ("begin", 2, 6), ("failed", 6), ("reset", 4), "again", ("begin", 4, 4),
    ]  # fmt: skip
    assert everyones(world, seen) == list(range(8 * world.size()))
    assert_equal_everywhere(world, numbers(model[0]) + numbers(model[2]))


def test_a_failure_within_backward_leaves_the_optimizer_usable(world: Any) -> None:
    class Disagree(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            disagree(world, "within backward")
            return gradient

    model = net(0)
    optimizer = world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    state = world.elastic.TorchState(model, optimizer, failures=0)
    attempts = []

    @world.elastic.run
    def train(state: Any) -> None:
        attempts.append(1)
        for step in range(3):
            optimizer.zero_grad()
            hidden = model[1](model[0](torch.randn(4, 3, generator=torch.Generator().manual_seed(step))))
            if len(attempts) == step == 1:
                hidden = Disagree.apply(hidden)
            model[2](hidden).square().sum().backward()
            optimizer.step()

    train(state)
    assert len(attempts) == 2
    assert_equal_everywhere(world, numbers(model[0]) + numbers(model[2]))


def test_new_hosts_interrupt_without_going_back(world: Any) -> None:
    state = world.elastic.ObjectState(step=0)
    resets = []
    state.register_reset_callbacks([lambda: resets.append(state.step)])

    @world.elastic.run
    def train(state: Any) -> int:
        while state.step < 4:
            state.step += 1
            if state.step == 2 and world.rank() == 0:
                state.on_hosts_updated()
            state.commit()
        return state.step

    assert train(state) == 4 and resets == [2]


def test_it_gives_up(world: Any) -> None:
    attempts = []

    @world.elastic.run
    def train(state: Any) -> None:
        attempts.append(1)
        if len(attempts) < 3:
            state.commit()
        disagree(world, "always")

    with pytest.raises(world.HorovodInternalError, match="always"):
        train(world.elastic.ObjectState(epoch=0))
    # Two attempts committed something; those without a commit end at the third in a row.
    assert len(attempts) == 4
    assert_equal_everywhere(world, len(attempts))

    @world.elastic.run
    def wrong(state: Any) -> None:
        raise KeyError("not a collective's")

    with pytest.raises(KeyError):
        wrong(world.elastic.ObjectState(epoch=0))


def test_a_failure_of_one_rank_alone_is_not_survived(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if world.size() == 1:
        return
    monkeypatch.setattr("mpiddp.elastic.renewal.MEETING_TIMEOUT_S", 0.5)
    outcome = "none"

    @world.elastic.run
    def train(state: Any) -> None:
        if world.rank() == 0:
            raise world.HorovodInternalError("rank 0 alone")

    if world.rank() == 0:
        with pytest.raises(world.HorovodInternalError, match="not all of the others did") as caught:
            train(world.elastic.ObjectState(epoch=0))
        outcome = str(caught.value.__cause__)
    else:
        train(world.elastic.ObjectState(epoch=0))
    assert world.broadcast_object(outcome) == "rank 0 alone"
    # Rank 0's question is still open; answer it, so that the job can end.
    if world.rank() != 0:
        world.allreduce(torch.tensor([False]), op=world.Max, name="elastic.renew")
