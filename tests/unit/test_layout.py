"""Buckets: what lies in which, in which order, and where."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpiddp.optimizer.layout import Bucket, _read_together, plan, read_tails


def test_the_first_bucket_is_smaller_and_a_large_parameter_has_its_own() -> None:
    assert plan([1, 1, 1, 9, 1, 1, 1], [0] * 7, range(7), 2, 3) == [[0, 1], [2], [3], [4, 5, 6]]


def test_the_order_is_followed() -> None:
    assert plan([2, 2, 2, 2], [0] * 4, [3, 1, 0, 2], 2, 4) == [[3], [1, 0], [2]]


def test_kinds_do_not_mix_and_buckets_come_in_the_order_of_their_last_gradient() -> None:
    assert plan([1] * 6, ["a", "b", "a", "b", "a", "b"], range(6), 2, 2) == [[0, 2], [1, 3], [4], [5]]
    assert plan([1] * 3, ["a", "b", "a"], range(3), 9, 9) == [[1], [0, 2]]


@pytest.mark.parametrize("first", [0, 1, 100])
def test_every_parameter_has_one_place(first: int) -> None:
    nbytes = [7 * i % 11 for i in range(50)]
    groups = plan(nbytes, [i % 3 for i in range(50)], list(reversed(range(50))), first, 20)
    assert sorted(i for group in groups for i in group) == list(range(50))


def test_views_have_the_shape_and_strides_of_the_parameters() -> None:
    params = [
        nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last).weight,
        torch.zeros(5, 7).t(),
        torch.zeros(()),
        torch.zeros(0, 3),
        torch.zeros(10)[::2],
    ]
    bucket = Bucket.over(range(5), params)
    for view, param in zip(bucket.views[:4], params, strict=False):
        assert view.shape == param.shape and view.stride() == param.stride()
    assert bucket.views[4].is_contiguous()
    for number, view in enumerate(bucket.views):
        assert view.data_ptr() % 64 == bucket.flat.data_ptr() % 64 or view.numel() == 0
        view.fill_(number + 1)
    assert [int(v.sum()) for v in bucket.views] == [(n + 1) * p.numel() for n, p in enumerate(params)]
    assert bucket.flags.tolist() == [0] * 5 and bucket.control.tolist() == [0, 0]


def test_flags_of_several_buckets_are_read_at_once() -> None:
    """On a device by one copy for all, whatever their dtypes."""
    params = [nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    buckets = [Bucket.over([number], params) for number in range(3)] + [Bucket.over([0], params)]
    for number, bucket in enumerate(buckets):
        bucket.tail.copy_(torch.tensor([number / 4, 0, number == 2]))
    tails = [bucket.tail for bucket in buckets]
    assert read_tails(buckets) == _read_together(tails) == [[0, 0, 0], [0.25, 0, 0], [0.5, 0, 1], [0.75, 0, 0]]
    assert _read_together([]) == []
