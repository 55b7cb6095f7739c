"""The gradients of a bucket as matrices, with what is remembered of each. No exchange."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..layout import is_dense

__all__ = ["Stack", "compute_dtype", "first_qs", "matrix_shape", "orthonormal"]


def matrix_shape(param: torch.Tensor) -> tuple[int, int] | None:
    """Rows and columns of a gradient as a matrix, in the order in which its elements lie in memory; None where it has
    fewer than two dimensions longer than 1, or is no real number.

    A convolution's (out, in, height, width) has ``out`` rows.
    """
    if not param.dtype.is_floating_point or param.dtype.itemsize < 2:
        return None
    lengths = [length for length in param.shape if length > 1]
    if is_dense(param):
        pairs = zip(param.stride(), param.shape, strict=True)
        lengths = [length for _, length in sorted(pairs, reverse=True) if length > 1]
    if len(lengths) < 2 or not param.numel():
        return None
    return lengths[0], param.numel() // lengths[0]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which P, Q and errors are kept, and travel, for gradients of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _first_q(rank: int, cols: int, seed: int, index: int) -> torch.Tensor:
    """The Q that parameter ``index`` begins with, transposed: the same on every rank of the job."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % (1 << 63))
    return torch.randn(rank, cols, generator=generator, dtype=torch.float32, device="cpu")


def orthonormal(p: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of what the columns of each of (k, rows, rank) span, by QR; where they are dependent (a
    gradient of zeros), completed by others."""
    basis: torch.Tensor = torch.linalg.qr(p)[0]
    return basis


@dataclass(frozen=True)
class Stack:
    """Matrices of one shape that lie side by side in a bucket, from element ``start`` on, ``pitch`` apart.

    ``error`` is (k, rows, cols), ``p`` is (k, rows, rank), ``q``, transposed since products are
    then several times as fast, is (k, rank, cols). ``p`` and ``q`` are views of flat
    tensors, which travel; ``q`` and ``error`` are what is remembered from step to step. ``indices`` are those of the
    parameters, and ``at`` their places in the bucket.
    """

    indices: tuple[int, ...]
    at: tuple[int, ...]
    start: int
    pitch: int
    error: torch.Tensor
    p: torch.Tensor
    q: torch.Tensor

    @property
    def end(self) -> int:
        """Where what comes next in the bucket begins."""
        return self.start + len(self.at) * self.pitch

    def gradients(self, flat: torch.Tensor) -> torch.Tensor:
        """A view of the bucket's ``flat``: (k, rows, cols)."""
        count, rows, cols = self.error.shape
        return flat[self.start : self.end].view(count, self.pitch)[:, : rows * cols].view(count, rows, cols)

    def project(self, flat: torch.Tensor) -> None:
        """Add the gradients to what earlier steps left of them, and write this rank's P."""
        self.error.add_(self.gradients(flat))
        torch.bmm(self.error, self.q.mT, out=self.p)

    def project_back(self, basis: torch.Tensor) -> None:
        """Write this rank's Q for the basis (k, rows, rank), on which all ranks agree."""
        torch.bmm(basis.mT, self.error, out=self.q)

    def expand(self, basis: torch.Tensor, flat: torch.Tensor, gain: float, flags: Sequence[float]) -> None:
        """Write ``gain`` times the product to the bucket, and remember what it leaves out; all of it for a parameter
        that got no gradient on any rank, by ``flags`` of the bucket."""
        target = self.gradients(flat)
        is_same_type = target.dtype == self.error.dtype  # then it needs no memory of its own
        result = torch.bmm(basis, self.q, out=target) if is_same_type else torch.bmm(basis, self.q)
        self.error.sub_(result)
        for number, at in enumerate(self.at):
            if flags[at] == 0:
                self.error[number].add_(result[number])
        if gain != 1.0:
            result.mul_(gain)
        if not is_same_type:
            target.copy_(result)

    def spoil(self, flat: torch.Tensor, seed: int) -> None:
        """Some rank's gradient was not finite: nor is the result, and nothing of it is remembered."""
        self.gradients(flat).fill_(torch.nan)
        self.error.zero_()
        self.q.copy_(first_qs(self.indices, self.q, seed))


def first_qs(indices: Iterable[int], like: torch.Tensor, seed: int) -> torch.Tensor:
    """The first Q of each of ``indices``, (k, rank, cols) as ``like`` is, in float32 on the CPU."""
    return torch.stack([_first_q(like.shape[-2], like.shape[-1], seed, index) for index in indices])
