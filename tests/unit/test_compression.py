"""Compressed gradients in a simulated world, against what the formula says in one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mpiddp.compression import Compression, PowerSGD
from mpiddp.optimizer.layout import Bucket, Layout
from mpiddp.optimizer.options import Options
from mpiddp.optimizer.powersgd import ways_of
from mpiddp.optimizer.powersgd.stacks import first_qs, matrix_shape
from mpiddp.optimizer.wire import Sending
from tests.simulated_world import Program, World

SHAPES = [(6, 10), (9, 4), (7,), (6, 10), (5, 3, 4), (1, 8), ()]
MATRICES = {0: (6, 10), 1: (9, 4), 3: (6, 10), 4: (5, 12)}


class Job:
    """The ranks' wires and layouts; ``step`` exchanges one gradient of each parameter."""

    def __init__(
        self, size: int, compression: Any, dtype: torch.dtype = torch.float64, bucket_nbytes: int = 1000, **options: Any
    ) -> None:
        self.size, self.bucket_nbytes, self.dtype = size, bucket_nbytes, dtype
        self.world = World(size, seed=size)
        self.params = [torch.zeros(shape, dtype=dtype) for shape in SHAPES]
        wire, lay_out = ways_of(chosen := Options(compression=compression, **options))
        self.handles: list[list[Any]] = [[] for _ in range(size)]
        self.lanes = [channel.lane() for channel in self.world.channels]
        for lane, handles in zip(self.lanes, self.handles, strict=True):
            _record(lane, handles)
        self.wires = [wire(lane, chosen) for lane in self.lanes]
        self.layouts: list[Layout] = [lay_out(self.params) for _ in range(size)]
        self.lay_out(reversed(range(len(SHAPES))))

    def lay_out(self, order: Any) -> None:
        order = list(order)
        for layout in self.layouts:
            layout.renew(order, self.bucket_nbytes, self.bucket_nbytes, None)

    def step(self, gradients: Sequence[Sequence[torch.Tensor | None]]) -> list[torch.Tensor]:
        """``gradients[rank][parameter]``; the results, which are the same bits on every rank."""
        self.world.play({rank: self._step(rank, gradients[rank]) for rank in range(self.size)})
        results = [[layout.view(index).clone() for index in range(len(SHAPES))] for layout in self.layouts]
        for result in results:
            for one, other in zip(result, results[0], strict=True):
                assert torch.equal(one.nan_to_num(-1), other.nan_to_num(-1)), "the ranks differ"
        return results[0]

    def _step(self, rank: int, gradients: Sequence[torch.Tensor | None]) -> Program:
        self.lanes[rank].begin_cycle()
        sent: list[Sending] = []
        for number, bucket in enumerate(self.layouts[rank].buckets):
            fill(bucket, gradients)
            sent.append(self.wires[rank].launch(f"bucket {number}", bucket))
        engine = self.world.engines[rank]
        for phase in (Sending.turn, Sending.wait):
            while not all(handle.done for handle in self.handles[rank]):
                yield False
            for sending in sent:
                getattr(sending, phase.__name__)(engine)
            yield True
        self.lanes[rank].end_cycle()


def _record(lane: Any, handles: list[Any]) -> None:
    launch = lane.launch
    lane.launch = lambda *args: handles.append(launch(*args)) or handles[-1]


def fill(bucket: Bucket, gradients: Sequence[torch.Tensor | None]) -> None:
    for at, index in enumerate(bucket.indices):
        gradient = gradients[index]
        bucket.views[at].copy_(torch.zeros(()) if gradient is None else gradient)
        bucket.flags[at] = gradient is not None


def drawn(size: int, seed: int, dtype: torch.dtype = torch.float64) -> list[list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in SHAPES] for _ in range(size)
    ]


def mean(gradients: Sequence[Sequence[torch.Tensor]], index: int) -> torch.Tensor:
    return torch.stack([each[index] for each in gradients]).mean(0)


class Naive:
    """The formula, in one process."""

    def __init__(self, size: int, rank: int) -> None:
        self.q = {i: first_qs([i], torch.empty(min(rank, n, m), m), 0)[0].double().T for i, (n, m) in MATRICES.items()}
        self.errors = [
            {i: torch.zeros(shape, dtype=torch.float64) for i, shape in MATRICES.items()} for _ in range(size)
        ]

    def step(self, gradients: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        results = [mean(gradients, index) for index in range(len(SHAPES))]
        for index, shape in MATRICES.items():
            whole = [own[index].view(shape) + error[index] for own, error in zip(gradients, self.errors, strict=True)]
            p = torch.stack([each @ self.q[index] for each in whole]).mean(0)
            basis = torch.linalg.qr(p)[0]
            self.q[index] = torch.stack([each.T @ basis for each in whole]).mean(0)
            product = basis @ self.q[index].T
            for each, error in zip(whole, self.errors, strict=True):
                error[index] = each - product
            results[index] = product.view(SHAPES[index])
        return results


def powersgd(**options: Any) -> PowerSGD:
    return Compression.powersgd(**{"rank": 2, "start_step": 0, "min_compression_rate": 0.01} | options)


def assert_close(mine: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], factor: float = 1.0) -> None:
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, factor * other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "options", [{}, {"average": False}, {"predivide": 3.0}, {"bucket_nbytes": 1 << 20}, {"bucket_nbytes": 8}], ids=str
)
def test_powersgd_is_the_formula(size: int, options: dict[str, Any]) -> None:
    job, naive = Job(size, powersgd(), **options), Naive(size, 2)
    state = torch.get_rng_state()
    for seed in range(3):
        gradients = drawn(size, seed)
        assert_close(job.step(gradients), naive.step(gradients), 1.0 if options.get("average", True) else size)
        if seed == 1:  # other buckets: what is remembered moves
            job.lay_out([3, 0, 6, 2, 5, 1, 4])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_powersgd_of_full_rank_is_the_mean(size: int) -> None:
    job = Job(size, powersgd(rank=99))
    for seed in range(3):
        gradients = drawn(size, seed)
        assert_close(job.step(gradients), [mean(gradients, index) for index in range(len(SHAPES))])


def test_powersgd_sends_what_it_left_out() -> None:
    """Of gradients that stay the same nothing is lost: what arrives on average goes to the mean as 1 / steps."""
    job, gradients = Job(3, powersgd(rank=1)), drawn(3, 0)
    want = [mean(gradients, index) for index in range(len(SHAPES))]
    total = [torch.zeros_like(each) for each in want]
    far = []
    for step in range(1, 161):
        for sum_, result in zip(total, job.step(gradients), strict=True):
            sum_ += result
        if step in (10, 40, 160):
            far.append(
                max(float((sum_ / step - each).norm() / each.norm()) for sum_, each in zip(total, want, strict=True))
            )
    assert far[1] < far[0] / 2 and far[2] < far[1] / 2 and far[2] < 0.05, far


def test_powersgd_keeps_what_nobody_takes() -> None:
    """A parameter without a gradient on any rank keeps its error, for the next gradient."""
    job, naive = Job(2, powersgd()), Naive(2, 2)
    first, second, third = (drawn(2, seed) for seed in range(3))
    job.step(first)
    naive.step(first)
    job.step([[gradient if index != 0 else None for index, gradient in enumerate(each)] for each in second])
    errors = [own[0].clone() for own in naive.errors]
    naive.step(second)
    bucket = next(bucket for bucket in job.layouts[0].buckets if 0 in bucket.indices)
    stack = next(stack for stack in bucket.stacks if 0 in stack.indices)  # type: ignore[attr-defined]
    torch.testing.assert_close(stack.error[stack.indices.index(0)], errors[0])
    assert_close(job.step(third)[1:3], naive.step(third)[1:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_powersgd_forgets_an_overflow(dtype: torch.dtype) -> None:
    """One rank's infinity is seen by all, as GradScaler needs, and spoils no later step."""
    job, gradients = Job(2, powersgd(), dtype), drawn(2, 0, dtype)
    job.step(gradients)
    bad = [[gradient.clone() for gradient in each] for each in gradients]
    bad[1][0][2, 3] = torch.inf
    assert not torch.isfinite(job.step(bad)[0]).all()
    for _ in range(2):
        assert all(torch.isfinite(result).all() for result in job.step(gradients))
    assert all(torch.isfinite(result).all() for result in job.step([[0 * g for g in each] for each in gradients]))


def test_powersgd_begins_at_its_step_and_where_it_saves() -> None:
    job = Job(2, powersgd(start_step=2, rank=1, min_compression_rate=2.9))
    for step in range(4):
        gradients = drawn(2, step)
        results = job.step(gradients)
        changed = {i for i, each in enumerate(results) if not torch.allclose(each, mean(gradients, i))}
        assert changed == ({0, 3, 4} if step >= 2 else set())  # 3 * (9 + 4) > 9 * 4


def test_what_is_a_matrix() -> None:
    image = torch.zeros(8, 3, 5, 5)
    assert matrix_shape(image) == (8, 75)
    assert matrix_shape(image.to(memory_format=torch.channels_last)) == (8, 75)
    assert matrix_shape(torch.zeros(4, 6).t()) == (4, 6)  # as it lies in memory
    assert matrix_shape(torch.zeros(1, 4, 6)) == (4, 6)
    none = [torch.zeros(5), torch.zeros(()), torch.zeros(1, 5), torch.zeros(0, 3), torch.zeros(3, 3).cfloat()]
    assert [matrix_shape(each) for each in none] == [None] * 5


def test_powersgd_says_what_is_wrong() -> None:
    for wrong in ({"rank": 0}, {"rank": 1.5}, {"start_step": -1}, {"seed": "x"}, {"min_compression_rate": 0}):
        (name,) = wrong
        with pytest.raises(ValueError, match=name):
            Compression.powersgd(**wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="DistributedOptimizer"):
        Compression.powersgd().compress(torch.zeros(3, 3))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("average", [True, False])
def test_a_sum_of_float16_does_not_overflow(size: int, average: bool) -> None:
    job = Job(size, Compression.fp16, torch.float32, average=average)
    results = job.step([[torch.full(shape, 60_000.0 - rank * 32) for shape in SHAPES] for rank in range(size)])
    want = sum(60_000.0 - rank * 32 for rank in range(size)) / (size if average else 1)
    for result in results:
        torch.testing.assert_close(result, torch.full_like(result, want), rtol=2e-3, atol=0)
