"""Buckets in which matrices of one shape lie side by side, before all that is not compressed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from ...compression import PowerSGD
from ..layout import Bucket, Layout, aligned_numel
from .stacks import Stack, compute_dtype, first_qs, matrix_shape

__all__ = ["PowerBucket", "PowerLayout"]


@dataclass(frozen=True, repr=False)
class PowerBucket(Bucket):
    """``p`` and ``q`` are the flat tensors of all stacks; ``rest`` is what travels as it is, the flags included."""

    stacks: tuple[Stack, ...]
    p: torch.Tensor
    q: torch.Tensor
    rest: torch.Tensor


class PowerLayout(Layout):
    """Remembers Q and the error of each parameter when the buckets change."""

    def __init__(self, params: Sequence[torch.Tensor], compression: PowerSGD) -> None:
        super().__init__(params)
        self._compression = compression
        #: Of each parameter its error and its Q.
        self.remembered: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def _shape(self, index: int) -> tuple[int, int, int] | None:
        """Rows, columns and rank of what stands for a gradient; None where it travels as it is."""
        shape = matrix_shape(self._params[index])
        rank = self._compression.rank_of(*shape) if shape is not None else 0
        return (*shape, rank) if shape is not None and rank else None

    def _bucket(self, group: Sequence[int]) -> Bucket:
        ordered = sorted(group, key=lambda index: self._shape(index) or ())  # stable: in the order in which they come
        whole = [index for index in ordered if self._shape(index) is None]
        ordered = ordered[len(whole) :] + whole
        bucket = Bucket.over(ordered, self._params, self.zeros)
        with torch.no_grad():
            return self._with_stacks(bucket) if len(whole) < len(ordered) else bucket

    def _with_stacks(self, bucket: Bucket) -> PowerBucket:
        families = list(self._families(bucket.indices))
        like, zeros = bucket.flat, self.zeros or _zeros
        dtype, align = compute_dtype(like.dtype), aligned_numel(like)
        p, q = (
            zeros(sum(len(at) * shape[side] * shape[2] for at, shape in families), dtype, like.device)
            for side in (0, 1)
        )
        stacks, p_at, q_at = [], 0, 0
        for at, (rows, cols, rank) in families:
            count = len(at)
            p_end, q_end = p_at + count * rows * rank, q_at + count * cols * rank
            stack = Stack(
                indices=tuple(bucket.indices[i] for i in at),
                at=tuple(at),
                start=int(bucket.views[at[0]].storage_offset() - like.storage_offset()),
                pitch=-(-rows * cols // align) * align,
                error=torch.zeros(count, rows, cols, dtype=dtype, device=like.device),
                p=p[p_at:p_end].view(count, rows, rank),
                q=q[q_at:q_end].view(count, rank, cols),
            )
            self._recall(stack)
            stacks.append(stack)
            p_at, q_at = p_end, q_end
        return PowerBucket(**vars(bucket) | {"stacks": tuple(stacks), "p": p, "q": q, "rest": like[stacks[-1].end :]})

    def _families(self, indices: Sequence[int]) -> Iterator[tuple[list[int], tuple[int, int, int]]]:
        """The places in the bucket of each shape, and rows, columns and rank."""
        for shape, places in groupby(range(len(indices)), key=lambda at: self._shape(indices[at])):
            if shape is not None:
                yield list(places), shape

    def _recall(self, stack: Stack) -> None:
        """Give the stack what is remembered of its parameters, or the first Q and no error."""
        stack.q.copy_(first_qs(stack.indices, stack.q, self._compression.seed))
        for number, index in enumerate(stack.indices):
            error, q = self.remembered.get(index, (stack.error[number], stack.q[number]))
            if (error.shape, q.shape) == (stack.error[number].shape, stack.q[number].shape):
                stack.error[number].copy_(error)
                stack.q[number].copy_(q)
            self.remembered[index] = stack.error[number], stack.q[number]

    def remember(self, qs: Mapping[int, torch.Tensor], errors: Mapping[int, torch.Tensor] | None) -> None:
        """Go on from these, which are written to where they are to lie; an error that is not given is zero, and all
        stay as they are without ``errors``."""
        for index, q in qs.items():
            error = (errors or {}).get(index)
            if index not in self.remembered:
                rows, cols, _ = self._shape(index) or (0, 0, 0)
                error = torch.zeros(rows, cols, dtype=q.dtype) if error is None else error.clone()
                self.remembered[index] = error, q.clone()
                continue
            own_error, own_q = self.remembered[index]
            if q.shape != own_q.shape:
                continue  # saved with another rank=: begins anew
            own_q.copy_(q)
            if errors is not None:
                own_error.zero_() if error is None else own_error.copy_(error)


def _zeros(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros(numel, dtype=dtype, device=device)
