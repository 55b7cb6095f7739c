"""Where parameters and gradients lie: two flat tensors of one layout, whose equal parts belong to the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ...errors import MpiddpError
from ..layout import Bucket, Layout

__all__ = ["ShardLayout", "Weights", "extents"]


class ShardLayout(Layout):
    """Buckets of ``shards`` equal parts. Within one, the parameters of a group (of the optimizer) lie side by side, so
    that few pieces are updated."""

    def __init__(self, params: Sequence[torch.Tensor], shards: int, group_of: Callable[[int], int]) -> None:
        super().__init__(params)
        self.shards = shards
        self.group_of = group_of

    def _bucket(self, group: Sequence[int]) -> Bucket:
        return Bucket.over(sorted(group, key=self.group_of), self._params, self.zeros, self.shards)


class Weights:
    """The parameters in buckets: each one's ``data`` is a view of one."""

    def __init__(self, params: Sequence[torch.Tensor], names: Sequence[str]) -> None:
        self._params = params
        self._names = names
        self.buckets: list[Bucket] = []

    @torch.no_grad()
    def renew(self, layout: ShardLayout) -> None:
        """Move the parameters to buckets laid out as the gradients' are. Parameters keep their identity."""
        self.buckets = []
        for gradients in layout.buckets:
            bucket = Bucket.over(gradients.indices, self._params, layout.zeros, layout.shards)
            self.buckets.append(bucket)
            for view, index in zip(bucket.views, bucket.indices, strict=True):
                view.copy_(self._params[index])
                self._params[index].data = view

    @torch.no_grad()
    def adopt(self) -> None:
        """Parameters whose ``data`` was replaced meanwhile come back, with their new values."""
        for bucket in self.buckets:
            for view, index in zip(bucket.views, bucket.indices, strict=True):
                param = self._params[index]
                if param.data_ptr() == view.data_ptr():
                    continue
                if (param.shape, param.dtype, param.device) != (view.shape, view.dtype, view.device):
                    raise MpiddpError(
                        f"parameter {self._names[index]!r} was {view.dtype} of shape {tuple(view.shape)} on "
                        f"{view.device} and is {param.dtype} of shape {tuple(param.shape)} on {param.device} now: "
                        "convert the model first, then make its optimizer and wrap it"
                    )
                view.copy_(param)
                param.data = view


def extents(bucket: Bucket) -> list[tuple[int, int]]:
    """For each parameter the elements of the bucket's data that are its own, the padding behind it included."""
    begin = bucket.flat.storage_offset()
    starts = [int(view.storage_offset() - begin) for view in bucket.views]
    return list(zip(starts, [*starts[1:], bucket.data.numel()], strict=True))
