"""Where each gradient lies: which bucket, and where in it. Pure, apart from allocating the buckets."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..transport.base import Link

__all__ = ["Bucket", "Layout", "aligned_numel", "is_dense", "plan", "read_tails", "shared_zeros"]

#: Every gradient begins at a multiple of this, so that vector instructions and foreach kernels find it aligned.
_ALIGN_NBYTES = 64

#: Makes a flat tensor of zeros, of so many elements, a dtype and a device.
Zeros = Callable[[int, torch.dtype, torch.device], torch.Tensor]


def aligned_numel(like: torch.Tensor) -> int:
    """Every gradient begins at a multiple of so many elements."""
    return max(1, _ALIGN_NBYTES // like.element_size())


def plan(
    nbytes: Sequence[int],
    kinds: Sequence[Hashable],
    order: Sequence[int],
    first_nbytes: int,
    bucket_nbytes: int,
    groups: Mapping[int, int] | None = None,
) -> list[list[int]]:
    """The parameters of each bucket, in the order in which buckets are exchanged.

    ``order`` is that in which gradients become ready. A bucket holds parameters of one kind (dtype and device), up to
    ``bucket_nbytes`` (the first one less) or a single parameter that is larger. The parameters of one group, a number
    in ``groups``, share a bucket of their own, of any size. Buckets come in the order in which their last gradient
    does.
    """
    buckets: list[list[int]] = []
    filling: dict[Hashable, list[int]] = {}
    filled: dict[Hashable, int] = {}
    for index in order:
        group = groups.get(index) if groups else None
        kind, size = (kinds[index], group), nbytes[index]
        limit = bucket_nbytes if buckets else first_nbytes
        if kind in filling and filled[kind] + size > limit and group is None:
            buckets.append(filling.pop(kind))
        filling.setdefault(kind, []).append(index)
        filled[kind] = filled[kind] + size if len(filling[kind]) > 1 else size
    position = {index: at for at, index in enumerate(order)}
    return sorted(buckets + list(filling.values()), key=lambda bucket: position[bucket[-1]])


@dataclass(frozen=True)
class Bucket:
    """A flat tensor: the gradients, one flag a parameter that says whether it has one, and two control flags (some
    gradient came too late for the buckets; some parameter has no place in them), used in the last bucket.

    ``views[i]`` has the shape and the strides of parameter ``indices[i]``. Flags are summed with the gradients, so
    that after the exchange a flag that is not zero means: some rank had a gradient. ``tail`` are both, and ``usual``
    what is in it when every parameter has a gradient and nothing is unusual.
    """

    indices: tuple[int, ...]
    flat: torch.Tensor
    views: tuple[torch.Tensor, ...]
    flags: torch.Tensor
    control: torch.Tensor
    tail: torch.Tensor
    usual: torch.Tensor

    @property
    def data(self) -> torch.Tensor:
        """The gradients, and what keeps them aligned (zeros): all but the flags."""
        return self.flat[: -(len(self.indices) + 2)]

    @classmethod
    def over(
        cls,
        indices: Sequence[int],
        params: Sequence[torch.Tensor],
        zeros: Zeros | None = None,
        shards: int = 1,
    ) -> Bucket:
        """A bucket for ``params[i]``, i in ``indices``, all of one dtype and device; its data can be cut into
        ``shards`` equal parts that are aligned too. ``zeros`` makes the memory."""
        like = params[indices[0]]
        align = aligned_numel(like)
        starts, end = [], 0
        for index in indices:
            starts.append(end)
            end += -(-params[index].numel() // align) * align
        end = -(-end // (shards * align)) * shards * align
        with torch.no_grad():
            numel = end + len(indices) + 2
            if zeros is not None:
                flat = zeros(numel, like.dtype, like.device)
            else:
                flat = torch.zeros(numel, dtype=like.dtype, device=like.device)
            views = tuple(_piece(flat, at, params[index]) for at, index in zip(starts, indices, strict=True))
            tail, usual = flat[end:], torch.ones(len(indices) + 2, dtype=like.dtype, device=like.device)
            usual[-2:] = 0
        return cls(tuple(indices), flat, views, tail[:-2], tail[-2:], tail, usual)

    def __repr__(self) -> str:
        size = self.flat.numel() * self.flat.element_size() / (1 << 20)
        return f"Bucket({len(self.indices)} parameters, {size:.2f} MiB of {self.flat.dtype} on {self.flat.device})"


def read_tails(buckets: Sequence[Bucket]) -> list[list[float]]:
    """What is in the tail of each bucket.

    The host waits for a device once, not once a bucket: at the end of the drain, when the exchanges are done and only
    what they enqueued last is not. A copy of each bucket's flags to the host would save that wait and cost one more
    event a bucket.
    """
    tails = [bucket.tail for bucket in buckets]
    return [tail.tolist() for tail in tails] if all(tail.is_cpu for tail in tails) else _read_together(tails)


def _read_together(tails: Sequence[torch.Tensor]) -> list[list[float]]:
    found: list[list[float]] = [[] for _ in tails]
    for device in dict.fromkeys(tail.device for tail in tails):
        numbers = [number for number, tail in enumerate(tails) if tail.device == device]
        values: list[float] = torch.cat([tails[number].float() for number in numbers]).tolist()
        at = 0
        for number in numbers:
            found[number] = values[at : at + tails[number].numel()]
            at += tails[number].numel()
    return found


def shared_zeros(link: Link) -> Zeros:
    """What makes tensors in memory that the members on this node can map, where they share any."""
    within = link.levels.local if link.levels is not None else link
    node = within.node

    def zeros(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if device.type == "cuda":
            return within.ways.empty(numel, dtype, device).zero_()
        if node is not None and device.type == "cpu":
            return node.memory.segments.empty((numel,), dtype)
        return torch.zeros(numel, dtype=dtype, device=device)

    return zeros


class Layout:
    """Where the gradient of each of ``params`` lies. ``params`` is the owner's list, which may grow."""

    def __init__(self, params: Sequence[torch.Tensor]) -> None:
        self._params = params
        self.zeros: Zeros | None = None  # makes the buckets, in memory that other ranks can map
        self.buckets: list[Bucket] = []
        self.place: dict[int, tuple[int, int]] = {}  # parameter -> its bucket, and where in it

    def view(self, index: int) -> torch.Tensor:
        """Where the gradient of parameter ``index`` lies in its bucket."""
        number, at = self.place[index]
        return self.buckets[number].views[at]

    def holds(self, index: int) -> bool:
        """Whether the gradient of parameter ``index`` lies in its bucket now."""
        return index in self.place and self._params[index].grad is self.view(index)

    def order(self) -> list[int]:
        """The parameters in the order of their places."""
        return [index for bucket in self.buckets for index in bucket.indices]

    def renew(
        self, order: Sequence[int], first_nbytes: int, bucket_nbytes: int, groups: Mapping[int, int] | None
    ) -> None:
        """New buckets, as :func:`plan` says; gradients that lie in the old ones move."""
        params = self._params
        nbytes = [param.numel() * param.element_size() for param in params]
        kinds = [(param.dtype, param.device) for param in params]
        held = {index: params[index].grad for index in order if self.holds(index)}
        self.buckets, self.place = [], {}
        for number, group in enumerate(plan(nbytes, kinds, order, first_nbytes, bucket_nbytes, groups)):
            bucket = self._bucket(group)
            self.buckets.append(bucket)
            for at, index in enumerate(bucket.indices):
                self.place[index] = (number, at)
                grad = held.pop(index, None)
                if grad is not None:
                    bucket.views[at].copy_(grad)
                    params[index].grad = bucket.views[at]

    def _bucket(self, group: Sequence[int]) -> Bucket:
        return Bucket.over(group, self._params, self.zeros)

    def __repr__(self) -> str:
        return f"Layout({len(self.place)} parameters in {len(self.buckets)} buckets)"


def _piece(flat: torch.Tensor, at: int, param: torch.Tensor) -> torch.Tensor:
    """The elements of ``flat`` from ``at`` on, with the parameter's strides where it is dense (channels_last, say),
    contiguous where it is not.

    A tensor of its own over the same memory, no view as autograd knows them: those refuse ``grad.detach_()``, which
    old scripts call before ``grad.zero_()``.
    """
    shaped = param if is_dense(param) else torch.empty(param.size(), device="meta")
    piece = torch.empty(0, dtype=flat.dtype, device=flat.device)
    return piece.set_(flat.untyped_storage(), flat.storage_offset() + at, shaped.size(), shaped.stride())


def is_dense(param: torch.Tensor) -> bool:
    """Whether the elements lie side by side, in whatever order of dims."""
    expected = 1
    for stride, length in sorted((st, n) for st, n in zip(param.stride(), param.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= length
    return True
