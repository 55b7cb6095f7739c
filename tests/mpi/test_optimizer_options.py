"""The options of DistributedOptimizer, each against one process over the whole batch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from tests.mpi.training import ROWS, assert_replicas_equal, shard

pytestmark = pytest.mark.ranks(2, 3, 4)


def build(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def batch(step: int) -> torch.Tensor:
    return torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def train(world: Any, options: dict[str, Any], *, steps: int = 4, tolerance: float = 1e-9, factor: float = 1.0) -> None:
    """A few steps with momentum, and the same in one process."""
    model, reference = build(), build()
    make = lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)  # noqa: E731
    optimizer = world.DistributedOptimizer(make(model), **options)
    plain = make(reference)
    for step in range(steps):
        optimizer.zero_grad()
        plain.zero_grad()
        model(shard(world, batch(step))).pow(2).mean().backward()
        (factor * reference(batch(step)).pow(2).mean()).backward()
        optimizer.step()
        plain.step()
        assert_replicas_equal(world, model)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


class Doubled:
    """A user's own compressor, by duck type: travels as float32, doubled."""

    seen: list[tuple[int, ...]]

    def __init__(self) -> None:
        self.seen = []

    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        self.seen.append(tuple(tensor.shape))
        return (2 * tensor).to(torch.float32), tensor.dtype

    def decompress(self, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        return tensor.to(ctx) / 2


class Transposed:
    """Static methods, and another shape on the way."""

    @staticmethod
    def compress(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return tensor.t(), None

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        return tensor.t()


def test_compression(world: Any) -> None:
    train(world, {"compression": world.Compression.none})
    train(world, {"compression": world.Compression.fp16}, tolerance=2e-3)
    train(world, {"compression": world.Compression.bf16}, tolerance=2e-2)
    own = Doubled()
    train(world, {"compression": own}, tolerance=1e-5)
    assert {(8, 5), (8,), (8, 8), (2, 8), (2,)} <= set(own.seen)
    train(world, {"compression": Transposed})
    train(world, {"compression": own, "op": world.Sum}, tolerance=1e-5, factor=world.size())
    train(world, {"compression": world.Compression.fp16, "num_groups": 2}, tolerance=2e-3)


def test_compression_of_a_single_allreduce(world: Any) -> None:
    size, rank = world.size(), world.rank()
    tensor = torch.full((3,), rank + 1.0)
    total = size * (size + 1) / 2
    for compression in (world.Compression.fp16, world.Compression.bf16, Doubled()):
        result = world.allreduce(tensor, op=world.Sum, compression=compression)
        assert result.dtype == torch.float32 and result[0] == total
        results = world.grouped_allreduce([tensor, tensor.double()], op=world.Sum, compression=compression)
        assert [r.dtype for r in results] == [torch.float32, torch.float64] and results[1][0] == total
    assert world.allreduce(torch.tensor([rank]), op=world.Sum, compression=world.Compression.fp16).dtype == torch.int64


def test_groups(world: Any) -> None:
    """As numbers of equal parts, as lists, with some parameters in no group; equal results whatever the grouping."""
    for count in (1, 2, 3, 6, 20):
        train(world, {"num_groups": count}, steps=2)
    train(world, {"groups": 2}, steps=2)
    model = build()
    params = list(model.parameters())
    optimizer = world.DistributedOptimizer(
        torch.optim.SGD(params, lr=0.1), model.named_parameters(), groups=[[params[0], params[5]], [params[2]]]
    )
    model(shard(world, batch(0))).sum().backward()
    buckets = [set(bucket.indices) for bucket in optimizer._mpiddp_reducer.layout.buckets]
    assert {0, 5} in buckets and {2} in buckets
    optimizer.step()
    assert_replicas_equal(world, model)
    stranger = nn.Parameter(torch.ones(1))
    for wrong in ([[params[0]], [params[0]]], [[stranger]], [params[0]], -1, "two", [["weight"]]):
        with pytest.raises(ValueError, match="group"):
            world.DistributedOptimizer(torch.optim.SGD(params, lr=0.1), groups=wrong)
    with pytest.raises(ValueError, match="num_groups"):
        world.DistributedOptimizer(torch.optim.SGD(params, lr=0.1), num_groups=-1)


def test_predivision(world: Any) -> None:
    """An average is the same whatever the factor; in 16 bits it keeps a sum from overflowing."""
    for factor in (0.5, 3.0, float(world.size())):
        train(world, {"gradient_predivide_factor": factor}, steps=2)
    may_overflow = world.local_size() < world.size()  # within a node 16-bit floats are added in float32
    for factor in (1.0, float(world.size())):
        weight = nn.Parameter(torch.ones(2))
        optimizer = world.DistributedOptimizer(
            torch.optim.SGD([weight], lr=1.0), compression=world.Compression.fp16, gradient_predivide_factor=factor
        )
        (weight * 40_000.0).sum().backward()
        assert torch.isfinite(weight.grad).all() or (factor == 1 and may_overflow)
        optimizer.synchronize()
    params = [nn.Parameter(torch.ones(1))]
    for options in ({"gradient_predivide_factor": 0.0}, {"gradient_predivide_factor": 2.0, "op": world.Sum}):
        with pytest.raises(ValueError, match="gradient_predivide_factor"):
            world.DistributedOptimizer(torch.optim.SGD(params, lr=0.1), **options)


def test_sums(world: Any) -> None:
    train(world, {"op": world.Sum}, factor=world.size())


# -- sparse gradients --------------------------------------------------------------------------------------------------


class Words(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 3, sparse=sparse)
        self.head = nn.Linear(3, 1)
        self.double()

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embedding(words)))


def words(step: int) -> torch.Tensor:
    return torch.randint(0, 10, (ROWS, 2), generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("as_dense", [False, True])
@pytest.mark.parametrize("options", ["average", "sum", "fp16", "passes", "average passes", "groups"])
def test_sparse_embeddings(world: Any, as_dense: bool, options: str) -> None:
    size, passes = world.size(), 2 if "passes" in options else 1
    arguments: dict[str, Any] = {
        "average": {},
        "sum": {"op": world.Sum},
        "fp16": {"compression": world.Compression.fp16},
        "passes": {"backward_passes_per_step": 2},
        "average passes": {"backward_passes_per_step": 2, "average_aggregated_gradients": True},
        "groups": {"num_groups": 1},
    }[options]
    factor = size if options == "sum" else 0.5 if options == "average passes" else 1.0
    model, reference = Words(True), Words(False)
    optimizer = world.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), sparse_as_dense=as_dense, **arguments
    )
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    numbers = itertools.count()
    for _ in range(4):
        optimizer.zero_grad()
        plain.zero_grad()
        for _ in range(passes):
            whole = words(next(numbers))
            model(shard(world, whole)).pow(2).mean().backward()
            (factor * reference(whole).pow(2).mean()).backward()
        grad = model.embedding.weight.grad
        assert grad.is_sparse is not as_dense
        tolerance = 1e-3 if options == "fp16" else 1e-9
        dense = grad.to_dense() if grad.is_sparse else grad
        torch.testing.assert_close(dense, reference.embedding.weight.grad, rtol=tolerance, atol=tolerance)
        optimizer.step()
        plain.step()
        assert_replicas_equal(world, model)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_sparse_on_one_rank_only(world: Any) -> None:
    """From the first step, and in turn; elsewhere there is no gradient at all."""
    size, rank = world.size(), world.rank()
    model = Words(True)
    for param in model.parameters():
        nn.init.zeros_(param)
    optimizer = world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    expected = torch.zeros(10, 3, dtype=torch.float64)
    for step in range(2 * size):
        optimizer.zero_grad()
        if rank == step % size:
            (model.embedding(torch.tensor([step, step, 9])).sum() + model.head.bias.sum()).backward()
        else:
            model.head.bias.sum().backward()
        optimizer.step()
        expected[[step, 9]] -= torch.tensor([[2.0], [1.0]]).double() / size
        torch.testing.assert_close(model.embedding.weight.detach(), expected)
        torch.testing.assert_close(model.head.bias.detach(), torch.full((1,), -1.0 - step).double())
    assert_replicas_equal(world, model)


def test_sparse_here_and_dense_there(world: Any) -> None:
    """One parameter, used by an embedding lookup on one rank and by a matrix product on the others."""
    size, rank = world.size(), world.rank()
    weight = nn.Parameter(torch.zeros(4, 2))
    optimizer = world.DistributedOptimizer(torch.optim.SGD([weight], lr=1.0))
    for step in range(3):
        optimizer.zero_grad()
        if rank == 0:
            nn.functional.embedding(torch.tensor([1]), weight, sparse=True).sum().backward()
        else:
            weight.sum().backward()
        want = torch.full((4, 2), (size - 1) / size)
        want[1] = 1.0
        grad = weight.grad.to_dense() if weight.grad.is_sparse else weight.grad
        torch.testing.assert_close(grad, want)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), -(step + 1) * want)


@pytest.mark.parametrize("op", ["Average", "Sum"])
def test_a_second_backward_onto_sparse_gradients(world: Any, op: str) -> None:
    """Exchanges what it added to averages; raises where they are sums."""
    size, rank = world.size(), world.rank()
    model = nn.Embedding(4, 2, sparse=True)
    nn.init.zeros_(model.weight)
    optimizer = world.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), model.named_parameters(), op=getattr(world, op)
    )
    rows = torch.tensor([rank % 4])
    for _ in range(2):
        optimizer.zero_grad()
        model(rows).sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    model(rows).sum().backward()
    if op == "Sum":
        with pytest.raises(world.MpiddpError, match=r"'weight'.*zero_grad"):
            model(rows).sum().backward()
        world.barrier()
        return
    model(rows).sum().backward()
    want = torch.zeros(4, 2)
    want[:size] = 2.0 / size
    torch.testing.assert_close(model.weight.grad.to_dense(), want)


def test_sparse_adam(world: Any) -> None:
    model, reference = Words(True), Words(True)
    make = lambda net: torch.optim.SparseAdam(net.embedding.parameters(), lr=0.1)  # noqa: E731
    optimizer, plain = world.DistributedOptimizer(make(model)), make(reference)
    assert isinstance(optimizer, torch.optim.SparseAdam)
    for step in range(4):
        optimizer.zero_grad()
        plain.zero_grad()
        model(shard(world, words(step))).pow(2).mean().backward()
        reference(words(step)).pow(2).mean().backward()
        optimizer.step()
        plain.step()
    torch.testing.assert_close(model.embedding.weight, reference.embedding.weight, rtol=1e-9, atol=1e-9)
    assert_replicas_equal(world, model.embedding)


# -- process sets ------------------------------------------------------------------------------------------------------


def test_a_process_set(world: Any) -> None:
    """Averaged among its members; the others train by themselves, with the same calls."""
    size, rank = world.size(), world.rank()
    rest = world.add_process_set(list(range(1, size)))
    for op in (world.Average, world.Sum):
        weight = nn.Parameter(torch.zeros(2))
        optimizer = world.DistributedOptimizer(torch.optim.SGD([weight], lr=1.0), op=op, process_set=rest)
        assert isinstance(optimizer, torch.optim.SGD)
        optimizer.set_backward_passes_per_step(1)
        for _ in range(2):
            optimizer.zero_grad()
            (weight * rank).sum().backward()
            optimizer.synchronize()
            with optimizer.skip_synchronize():
                optimizer.step()
        total = sum(range(1, size))
        want = rank if rank == 0 else total / (size - 1) if op is world.Average else total
        torch.testing.assert_close(weight.detach(), torch.full((2,), -2.0 * want))
    assert world.remove_process_set(rest)


def test_a_model_split_over_processes(world: Any) -> None:
    """A layer cut into pieces, one a rank of each team; the head and equal pieces of different teams are averaged."""
    size, rank = world.size(), world.rank()
    width = 2 if size == 4 else size  # ranks in a team
    teams = [list(range(first, first + width)) for first in range(0, size, width)]
    peers = [list(range(place, size, width)) for place in range(width)]
    everyone = world.global_process_set
    sets = {
        tuple(ranks): everyone if len(ranks) == size else world.add_process_set(ranks)
        for ranks in sorted({tuple(ranks) for ranks in (*teams, *peers)})
    }
    team, mates = (next(sets[tuple(g)] for g in groups if rank in g) for groups in (teams, peers))
    torch.manual_seed(1)
    first, head = nn.Linear(5, 12, bias=False).double(), nn.Linear(12, 1).double()
    whole = [param.detach().clone().requires_grad_() for param in (first.weight, head.weight, head.bias)]
    place, cut = team.rank(), 12 // width
    piece = nn.Parameter(first.weight.detach()[place * cut : (place + 1) * cut].clone())
    of_piece = world.DistributedOptimizer(torch.optim.SGD([piece], lr=0.1, momentum=0.9), process_set=mates)
    of_head = world.DistributedOptimizer(torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9))
    plain = torch.optim.SGD(whole, lr=0.1, momentum=0.9)
    for step in range(4):
        rows = batch(step)
        mine = rows.chunk(len(teams))[teams.index(team.ranks)]
        for optimizer in (of_piece, of_head, plain):
            optimizer.zero_grad()
        # Every rank of a team computes the team's loss; the gradient of a gather is the average over the team.
        hidden = world.allgather((mine @ piece.t()).t().contiguous(), process_set=team).t()
        head(torch.tanh(hidden)).pow(2).mean().backward()
        (torch.tanh(rows @ whole[0].t()) @ whole[1].t() + whole[2]).pow(2).mean().backward()
        for optimizer in (of_piece, of_head, plain):
            optimizer.step()
        torch.testing.assert_close(piece.detach(), whole[0].detach()[place * cut : (place + 1) * cut])
        torch.testing.assert_close(head.weight, whole[1])
        assert_replicas_equal(world, head)
    for one in sets.values():
        if one is not everyone:
            world.remove_process_set(one)


# -- what changes on the way -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("average", [False, True])
def test_requires_grad_changes(world: Any, passes: int, average: bool) -> None:
    """Frozen at first and trained later, thawed in the middle of an accumulation, on all ranks or on one."""
    rank = world.rank()
    model, reference = build(), build()
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    for net in (model, reference):
        net[0].requires_grad_(False)
    optimizer = world.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model.named_parameters(),
        backward_passes_per_step=passes,
        average_aggregated_gradients=average,
    )
    numbers = itertools.count()
    for step in range(5):
        optimizer.zero_grad()
        plain.zero_grad()
        for number in range(passes):
            if number == passes - 1:
                for net in (model, reference):
                    net[0].requires_grad_(step >= 2)
                    net[2].requires_grad_(step != 3)
            rows = batch(next(numbers))
            model(shard(world, rows)).pow(2).mean().backward()
            (reference(rows).pow(2).mean() / (passes if average else 1)).backward()
        for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None)
            if theirs.grad is not None:
                torch.testing.assert_close(mine.grad, theirs.grad)
        optimizer.step()
        plain.step()
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    model[0].requires_grad_(rank == 0)
    for net in (model[2], model[4]):
        net.requires_grad_(True)
    optimizer.zero_grad()
    for _ in range(passes):
        model(shard(world, batch(100))).pow(2).mean().backward()
    optimizer.step()
    assert_replicas_equal(world, model)


def test_zero_grad_in_every_way(world: Any) -> None:
    model = build()
    optimizer = world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    for set_to_none in (True, False):
        model(shard(world, batch(0))).sum().backward()
        optimizer.zero_grad(set_to_none=set_to_none)
        assert all((p.grad is None) == set_to_none for p in model.parameters())
    model(shard(world, batch(0))).sum().backward()
    model.zero_grad()
    model(shard(world, batch(1))).sum().backward()
    want = build()
    want(batch(1)).sum().backward()
    for mine, theirs in zip(model.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad / world.size())


@pytest.mark.parametrize("sparse", [False, True])
def test_sums_zeroed_in_place_by_the_model(world: Any, sparse: bool) -> None:
    model = nn.Embedding(4, 2, sparse=sparse)
    optimizer = world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), op=world.Sum)
    for _ in range(3):
        model.zero_grad(set_to_none=False)
        model(torch.tensor([1, 1, 3])).sum().backward()
        want = torch.tensor([0.0, 2.0, 0.0, 1.0])[:, None].expand(4, 2) * world.size()
        assert torch.equal(model.weight.grad.to_dense(), want)
        optimizer.step()
    with pytest.raises(world.MpiddpError, match="zero_grad"):
        model(torch.tensor([1])).sum().backward()
    world.barrier()


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_sums_of_passes_zeroed_by_the_model(world: Any, shard: bool, set_to_none: bool) -> None:
    """A new gradient, or a zeroed one, is no exchanged value at the second pass of the next step."""
    model, size = nn.Linear(3, 1, bias=False), world.size()
    nn.init.zeros_(model.weight)
    optimizer = world.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), op=world.Sum, backward_passes_per_step=2, shard=shard
    )
    for _ in range(3):
        model.zero_grad(set_to_none=set_to_none)
        for _ in range(2):
            model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert model.weight.tolist() == [[-6.0 * size] * 3]


def test_zero_grad_within_a_backward(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While gradients are under way it raises, and the backward can be finished."""
    from mpiddp.optimizer import distributed

    original = distributed.Options
    monkeypatch.setattr(distributed, "Options", lambda **k: original(**k | {"first_nbytes": 8, "bucket_nbytes": 8}))
    model = build()
    optimizer = world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    said: list[str] = []

    def meddle(_: torch.Tensor) -> None:
        try:
            optimizer.zero_grad()
        except Exception as error:
            said.append(str(error))

    model[0].weight.register_hook(meddle)
    for _ in range(2):
        said.clear()
        model(shard(world, batch(0))).sum().backward()
        assert len(said) == 1 and "zero_grad" in said[0]
        optimizer.step()
        optimizer.zero_grad()
    assert_replicas_equal(world, model)


def test_state_dicts(world: Any) -> None:
    """Saved and loaded half-way, into the wrapped optimizer and from a plain one."""
    model, reference = build(), build()
    make = lambda net: torch.optim.Adam(net.parameters(), lr=0.01)  # noqa: E731
    optimizer, plain = world.DistributedOptimizer(make(model)), make(reference)
    for step in range(4):
        if step == 2:
            state = optimizer.state_dict()
            assert state.keys() == plain.state_dict().keys()
            optimizer = world.DistributedOptimizer(make(model), model.named_parameters())
            optimizer.load_state_dict(plain.state_dict())
            plain.load_state_dict(state)
        optimizer.zero_grad()
        plain.zero_grad()
        model(shard(world, batch(step))).pow(2).mean().backward()
        reference(batch(step)).pow(2).mean().backward()
        optimizer.step()
        plain.step()
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_buffers_and_parameters_are_broadcast(world: Any) -> None:
    """The usual beginning of a script: only the root's model and optimizer count."""
    rank = world.rank()
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01 * (rank + 1))
    if rank == 0:
        model(torch.randn(4, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    world.broadcast_parameters(model.state_dict(), root_rank=0)
    world.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = world.DistributedOptimizer(optimizer, model.named_parameters())
    assert optimizer.param_groups[0]["lr"] == 0.01
    seen = world.allgather_object([value.tolist() for value in model.state_dict().values()])
    assert all(other == seen[0] for other in seen)
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    assert_replicas_equal(world, model)
    world.broadcast_parameters(model.named_parameters(), 1)
    world.broadcast_parameters(list(model.named_buffers()), 1)
    for wrong in (model, 3, torch.ones(1)):
        with pytest.raises((ValueError, TypeError)):
            world.broadcast_parameters(wrong, 0)
    with pytest.raises(ValueError, match="LBFGS"):
        world.broadcast_optimizer_state(torch.optim.LBFGS(model.parameters()), 0)


def test_names(world: Any) -> None:
    model, other = build(), build()
    params = list(model.parameters())
    make = lambda: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    assert world.DistributedOptimizer(make(), model.named_parameters()) is not None
    both = [*model.named_parameters(), *((f"other.{name}", param) for name, param in other.named_parameters())]
    assert world.DistributedOptimizer(make(), iter(both)) is not None
    cases = {
        "more than once": [("same", param) for param in params],
        "5 of the optimizer's 6": list(model.named_parameters())[1:],
        "pairs": params,
    }
    for said, named in cases.items():
        with pytest.raises(ValueError, match=said):
            world.DistributedOptimizer(make(), named)
    for passes in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="backward_passes_per_step"):
            world.DistributedOptimizer(make(), backward_passes_per_step=passes)
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer"):
        world.DistributedOptimizer(model)


def test_deterministic_refuses_what_it_cannot_be(world: Any) -> None:
    for wrong, words in (
        ({"compression": world.Compression.fp16}, "lossy compression"),
        ({"op": world.Adasum}, "Adasum"),
    ):
        model = torch.nn.Linear(2, 1)
        with pytest.raises(ValueError, match=words):
            world.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), deterministic=True, **wrong)
