"""The gradients of an optimizer's parameters: which lie in a bucket, which are sparse, which came too late. No
exchange.

While a bucket is under way its parameters' ``grad`` is None, so that nobody reads or adds to what the exchange is
writing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from ..memory.streams import Devices, Makers
from .layout import Bucket, Layout

__all__ = ["Gradients"]


class Gradients:
    """State: belongs to the thread that runs backward; its owner calls one hook at a time."""

    def __init__(
        self,
        sparse_as_dense: bool,
        may_repeat: bool,
        lay_out: Callable[[Sequence[torch.Tensor]], Layout] = Layout,
    ) -> None:
        self.params: list[torch.Tensor] = []
        self.names: list[str] = []
        self.layout = lay_out(self.params)
        self.sparse: set[int] = set()  # whose gradients are sparse, here or (once agreed) anywhere
        self.late: dict[int, torch.Tensor] = {}
        self.unsent: dict[int, torch.Tensor] = {}  # sparse here, and exchanged for the ranks where it is dense
        self._gathered: dict[int, torch.Tensor] = {}  # what the last exchange of sparse gradients gave
        self.unplaced = False  # some parameter has a gradient and no place, or a place and a sparse gradient
        self.averaged: set[int] = set()  # whose gradient holds an exchanged value
        self.kept: dict[int, torch.Tensor] = {}  # exchanged values that another exchange may not take again
        self._sparse_as_dense, self._may_repeat = sparse_as_dense, may_repeat
        self._makers: Makers | None = None

    def add(self, param: torch.Tensor, name: str) -> int:
        """A further parameter; its index."""
        self.params.append(param)
        self.names.append(name)
        return len(self.params) - 1

    def find_place(self, index: int) -> int | None:
        """The bucket of a gradient that has come; None if it has none, which the other ranks will be told."""
        if self.is_sparse(index):
            if index not in self.sparse:
                self.sparse.add(index)
                self.unplaced = True
            return None
        place = self.layout.place.get(index)
        if place is None:
            self.unplaced = True  # it began to be trained after the layout was made
            return None
        return place[0]

    def is_sparse(self, index: int) -> bool:
        """Whether the gradient is sparse and stays so; one that is to be dense is made dense here."""
        grad = self.params[index].grad
        if grad is None or grad.layout is torch.strided:
            return False
        if self._sparse_as_dense:
            self.params[index].grad = grad.to_dense()
            return False
        return True

    def adopt(self, index: int) -> None:
        """Make the gradient a view of its bucket: the only copy that is ever made of it."""
        param, view = self.params[index], self.layout.view(index)
        grad = param.grad
        if grad is view or grad is None:
            return
        view.copy_(grad)
        param.grad = view

    def take(self, index: int) -> None:
        """:meth:`adopt`, by the hook of the gradient, on the stream on which it was made."""
        if not self.layout.holds(index):
            self.averaged.discard(index)  # a new tensor, since the model or the user has zeroed it
        self.adopt(index)
        if self._makers is not None:
            number, at = self.layout.place[index]
            self._makers.note(number, self.layout.buckets[number].views[at])

    def watch_streams(self, devices: Devices) -> None:
        """There are new buckets; where some lie on devices, remember whose streams write them."""
        flats = [bucket.flat for bucket in self.layout.buckets if not bucket.flat.is_cpu]
        self._makers = Makers(devices, flats) if flats else None

    def keep_late(self, index: int) -> None:
        """A second gradient in one backward (shared by reentrant checkpoints) while the first one is under way."""
        grad = self.params[index].grad
        assert grad is not None
        self.params[index].grad = None
        self.late[index] = self.late[index] + grad if index in self.late else grad.detach().clone()

    def fill(self, bucket: Bucket, with_nothing: bool) -> None:
        """Make ``bucket`` ready to leave: gradients, zeros where there is none, and flags that say which."""
        if self._makers is not None:
            self._makers.gather(self.layout.place[bucket.indices[0]][0], bucket.flat)
        present = []
        for view, index in zip(bucket.views, bucket.indices, strict=True):
            param = self.params[index]
            is_here = param.grad is not None and not with_nothing and not self.is_sparse(index)
            present.append(is_here)
            if is_here and not self._keep(index):
                self.adopt(index)
                param.grad = None
            else:
                view.zero_()
        bucket.tail.copy_(bucket.usual if all(present) else torch.tensor([*present, 0, 0], device="cpu"))

    def _keep(self, index: int) -> bool:
        """Keep what an exchange gave apart from this one, where exchanging it again gives another value; whether it
        was kept."""
        if self._may_repeat or not self.holds_exchanged(index):
            return False
        grad = self._grad(index)
        self.kept[index] = grad.clone() if self.layout.holds(index) else grad
        self.params[index].grad = None
        return True

    def add_kept(self) -> None:
        """To what the buckets have brought."""
        for index, value in self.kept.items():
            self.layout.view(index).add_(value)
        self.kept.clear()

    def hand_out(self, bucket: Bucket, tail: Sequence[float]) -> Sequence[float]:
        """``grad`` is a view again, where some rank had a gradient; a parameter without one anywhere keeps None.

        ``tail`` is what came in the bucket's. Returns the control flags.
        """
        for index, view, flag in zip(bucket.indices, bucket.views, tail, strict=False):
            if flag != 0:
                if self.is_sparse(index) and not self._keep(index):
                    self.unsent[index] = self._grad(index)
                self.params[index].grad = view
                self.averaged.add(index)
        return tail[-2:]

    def _grad(self, index: int) -> torch.Tensor:
        grad = self.params[index].grad
        assert grad is not None
        return grad

    def holds_exchanged(self, index: int) -> bool:
        """Whether the gradient is still the tensor that an exchange gave, whatever has been added to it."""
        if index in self._gathered:
            return self.params[index].grad is self._gathered[index]
        return index in self.averaged and self.layout.holds(index)

    def to_gather(self, indices: Sequence[int], with_nothing: bool, passes: int) -> list[torch.Tensor | None]:
        """What this rank contributes to the exchange of sparse gradients: nothing where its gradient is exchanged."""
        own = []
        for index in indices:
            if index in self.averaged:
                grad = self.unsent.get(index)
            else:
                grad = None if self._keep(index) else self.params[index].grad
            own.append(None if grad is None or with_nothing else grad / passes if passes > 1 else grad)
        return own

    def take_gathered(self, index: int, whole: torch.Tensor | None) -> None:
        """The exchange of a sparse gradient gave ``whole``; a part of it may have been exchanged as a dense one."""
        self._gathered.pop(index, None)
        dense = self._grad(index) if index in self.averaged else None
        for before in (self.kept.pop(index, None), dense):  # dense + sparse, never the reverse
            if before is not None:
                whole = before if whole is None else before + whole
        self.params[index].grad = whole
        if whole is not None:
            self._gathered[index] = whole

    def forget(self) -> None:
        """The gradients were zeroed."""
        self.averaged.clear()
        self._gathered.clear()

    def end_cycle(self) -> None:
        """An exchange is over, or has failed: what was apart from the buckets is in them, or lost."""
        for apart in (self.late, self.unsent, self.kept):
            apart.clear()
        self.unplaced = False

    def forget_zeros(self, index: int) -> None:
        """Where the gradient is all zeros, what is added to it can be exchanged whatever it held before."""
        if not self.holds_exchanged(index):
            return
        grad = self._grad(index)
        if not (grad if grad.layout is torch.strided else grad.coalesce().values()).any():
            self.averaged.discard(index)
            self._gathered.pop(index, None)

    def fill_late(self, bucket: Bucket) -> None:
        """Make ``bucket``, an extra one, ready to leave with what came too late."""
        for view, index in zip(bucket.views, bucket.indices, strict=True):
            if index in self.late:
                view.copy_(self.late[index])
        bucket.flags.copy_(torch.tensor([index in self.late for index in bucket.indices], device="cpu"))

    def add_late(self, bucket: Bucket, extra: Bucket) -> None:
        """Add what ``extra`` brought to ``bucket``."""
        for at, (index, flag) in enumerate(zip(bucket.indices, extra.flags.tolist(), strict=True)):
            if flag == 0:
                continue
            if self.params[index].grad is None:
                bucket.views[at].zero_()
            bucket.views[at].add_(extra.views[at])
            self.params[index].grad = bucket.views[at]
            self.averaged.add(index)

    def make_late(self, indices: Iterable[int]) -> None:
        """The gradients of newly placed parameters were in no bucket when the buckets left."""
        for index in indices:
            grad = self.params[index].grad
            if grad is not None:
                self.late[index] = grad
                self.params[index].grad = None
