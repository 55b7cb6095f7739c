"""ElasticSampler: each rank's part of an epoch, which can be shared out anew in the middle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch.utils.data import Sampler

from .. import runtime

__all__ = ["ElasticSampler"]


class ElasticSampler(Sampler[int]):
    """Sample ids for this rank, less those that are processed already in this epoch.

    An epoch's order is drawn from ``(seed, epoch)``, the same on every rank; rank r takes its places ``r``,
    ``r + size``, ..., and ids from the front again where they do not divide. Say what has been processed, after each
    batch; put the sampler into a :class:`TorchState`; when that is restored or synchronised, or the world changes, the
    ids that are left are shared out among the ranks that there are. Call ``set_epoch(epoch + 1)`` at the end of an
    epoch, not at its beginning, which may be in the middle of one that was interrupted.

    Args:
        dataset: anything with a length, or the length itself.
        shuffle: draw a new order each epoch; False: ids in their own order.
        seed: the same on every rank.

    Raises:
        NotInitializedError: made before ``mpiddp.init()``.
    """

    def __init__(self, dataset: Sized | int, shuffle: bool = True, seed: int = 0) -> None:
        super().__init__()
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = int(seed)
        self.epoch = 0
        #: So many of the order's ids, from its front, have been processed by all ranks together.
        self.processed_num = 0
        #: Processed ids that were recorded one by one on this rank since the ids were last shared out.
        self.recorded: set[int] = set()
        self._excluded: set[int] = set()  # recorded before that, on any rank: the order is without them
        self.reset()

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch: nothing of it has been processed. With the same number on every rank."""
        self.epoch = int(epoch)
        self.processed_num = 0
        self.recorded.clear()
        self._excluded.clear()
        self.reset()

    def record_batch(self, batch_idx: int, batch_size: int) -> None:
        """A batch of this size has been processed on every rank; batches are counted, whatever ``batch_idx`` is."""
        self.processed_num = min(len(self._order), self.processed_num + int(batch_size) * self.num_replicas)

    def record_indices(self, indices: Iterable[int]) -> None:
        """These ids have been processed on this rank: for ranks that do not go in step, in place of record_batch."""
        ids = {int(index) for index in indices}
        wrong = sorted(index for index in ids if not 0 <= index < self._length())
        if wrong:
            raise ValueError(f"the data set has {self._length()} samples; there are none of index {wrong[:10]}")
        self.recorded |= ids

    def get_indices(self, batch_idx: int, batch_size: int) -> list[int]:
        """This rank's ids in a batch, counted from where the ids were last shared out."""
        return self.indices[batch_idx * batch_size : (batch_idx + 1) * batch_size]

    @property
    def processed_indices(self) -> set[int]:
        """The ids processed in this epoch, as far as this rank knows."""
        return self._excluded | self.recorded | set(self._order[: self.processed_num].tolist())

    @property
    def remaining_indices(self) -> list[int]:
        """What was left for all ranks when the ids were last shared out."""
        return self._remaining.tolist()

    def state_dict(self) -> dict[str, Any]:
        """The epoch and what of it has been processed, as far as this rank knows."""
        return self.place(self.recorded)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to where :meth:`state_dict` was taken, in whatever world, and share out what is left."""
        self.epoch = int(state_dict["epoch"])
        self.processed_num = int(state_dict.get("processed_num", 0))
        self._excluded = {int(index) for index in state_dict.get("processed_indices", ())}
        self.recorded.clear()
        self.reset()

    def place(self, recorded: Iterable[int]) -> dict[str, Any]:
        """:meth:`state_dict` with ``recorded`` (of all ranks, say) as what was recorded one by one."""
        new = sorted(set(recorded) - self._excluded)
        front = self._order[: self.processed_num]
        # An id that leaves the order leaves the front of it, too, if it stood there.
        moved = int(torch.isin(front, torch.tensor(new, dtype=front.dtype, device="cpu")).sum()) if new else 0
        return {
            "epoch": self.epoch,
            "processed_num": self.processed_num - moved,
            "processed_indices": sorted(self._excluded.union(new)),
        }

    def reset(self) -> None:
        """Share out what is left among the ranks that there are now."""
        place = self.state_dict() if self.recorded else None
        if place is not None:
            self.processed_num, self._excluded = place["processed_num"], set(place["processed_indices"])
            self.recorded.clear()
        self.num_replicas, self.rank = runtime.size(), runtime.rank()
        self._order = self._drawn()
        self._remaining = self._order[self.processed_num :]
        left = len(self._remaining)
        self.num_samples = -(-left // self.num_replicas)
        self.total_size = self.num_samples * self.num_replicas
        places = self.rank + self.num_replicas * torch.arange(self.num_samples, device="cpu")
        self.indices: list[int] = self._remaining[places % max(1, left)].tolist()

    def _drawn(self) -> torch.Tensor:
        if self.shuffle:
            generator = torch.Generator(device="cpu").manual_seed(self.seed + self.epoch)
            order = torch.randperm(self._length(), generator=generator, device="cpu")
        else:
            order = torch.arange(self._length(), device="cpu")
        if not self._excluded:
            return order
        return order[~torch.isin(order, torch.tensor(sorted(self._excluded), device="cpu"))]

    def _length(self) -> int:
        return self.dataset if isinstance(self.dataset, int) else len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        """The number of ids on this rank that were left when they were last shared out."""
        return self.num_samples

    def __repr__(self) -> str:
        return (
            f"<ElasticSampler of {self._length()} samples, shard {self.rank} of {self.num_replicas}, "
            f"epoch {self.epoch}, {len(self._excluded) + self.processed_num} processed>"
        )
