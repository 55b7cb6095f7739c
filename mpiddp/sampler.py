"""ShardSampler: each rank's own part of a data set, drawn anew each epoch, the same plan on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import torch
from torch.utils.data import Sampler

from . import runtime
from .log import logger

__all__ = ["ShardSampler"]


class ShardSampler(Sampler[int]):
    """Sample ids for this rank: position ``rank``, ``rank + size``, ``rank + 2 * size`` ... of one common order.

    The order is a function of ``(seed, epoch)`` alone and touches no global random state, so nothing is exchanged and
    nothing has to be saved: a resumed run that calls ``set_epoch(e)`` sees what the first run saw. Where all ranks get
    equally many ids, they are those of ``torch.utils.data.DistributedSampler`` with the same arguments.

    To go on in the middle of an epoch, say after each step with :meth:`record` how many samples it took, after each
    pass with :meth:`finish_epoch` that it is over, and keep :meth:`state_dict` in a checkpoint: the place is counted in
    samples of all ranks, so that another number of ranks shares out exactly what is left.

    Args:
        dataset: anything with a length, or the length itself.
        shuffle: draw a new order each epoch; False: ids in their own order.
        seed: the same on every rank.
        pad: True: ids from the front of the order are repeated until every rank has equally many, as training wants it
            (every rank takes the same number of steps). False: every id exactly once over all ranks, which may then
            differ by one in their length, as evaluation wants it.
        num_replicas, rank: into how many shards, and which one is ours; both or neither. By default
            :func:`mpiddp.size` and :func:`mpiddp.rank`, asked for when they are first needed: the sampler may be
            built before :func:`mpiddp.init`.
        drop_last: leave out up to ``num_replicas - 1`` ids at the end of the order so that every rank has equally many
            and none is repeated, whatever ``pad`` says.

    Raises:
        ValueError, TypeError: unusable arguments.
        NotInitializedError: iterated or measured before ``mpiddp.init()``, without ``num_replicas`` and ``rank``.
    """

    def __init__(
        self,
        dataset: Sized | int,
        shuffle: bool = True,
        seed: int = 0,
        pad: bool = True,
        num_replicas: int | None = None,
        rank: int | None = None,
        drop_last: bool = False,
    ) -> None:
        super().__init__()
        _check_shard(num_replicas, rank)
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = int(seed)
        self.pad = pad
        self.drop_last = drop_last
        self.epoch = 0
        #: So many ids of the epoch's order, from its front, have been recorded by all ranks together.
        self.consumed = 0
        self._begin = 0  # where the order was last shared out
        self._is_resumed = False
        self._shard = None if num_replicas is None or rank is None else (num_replicas, rank)
        self._epoch_was_set = False
        self._passes = 0
        _ = self.num_samples_total  # a data set without a length is an error here, not in the first epoch

    @property
    def num_samples_total(self) -> int:
        """The number of samples in the data set."""
        if isinstance(self.dataset, int):
            if self.dataset < 0:
                raise ValueError(f"the length of a data set cannot be negative: {self.dataset}")
            return self.dataset
        if not hasattr(self.dataset, "__len__"):
            kind = type(self.dataset).__name__
            raise TypeError(f"a ShardSampler needs a data set with a length, or the length itself; {kind} has none")
        return len(self.dataset)

    @property
    def num_replicas(self) -> int:
        """Into how many shards the data set is cut."""
        return runtime.size() if self._shard is None else self._shard[0]

    @property
    def rank(self) -> int:
        """Which shard is ours."""
        return runtime.rank() if self._shard is None else self._shard[1]

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass; call it before each epoch, with the same number on every rank.

        The pass begins at the front; but after :meth:`load_state_dict`, and for the epoch that was loaded, where that
        was left.
        """
        if not (self._is_resumed and int(epoch) == self.epoch):
            self.consumed = self._begin = 0
        self._is_resumed = False
        self.epoch = int(epoch)
        self._epoch_was_set = True

    def record(self, count: int) -> None:
        """A step has taken ``count`` samples on every rank. Counted so, loaders may read ahead."""
        self.consumed = min(self.num_samples_total, self.consumed + int(count) * self.num_replicas)

    def finish_epoch(self) -> None:
        """The pass is over: what was not recorded, since the loader dropped it (its ``drop_last``), is not left."""
        self.consumed = self.num_samples_total

    @property
    def next_epoch(self) -> int:
        """The epoch to go on with after a checkpoint: the one that was left, or the next if all of it is recorded, it
        was finished, or with ``drop_last`` all is recorded but what is too little for every rank to have one."""
        left = self.num_samples_total - self.consumed
        is_over = left < self.num_replicas if self.drop_last else left <= 0
        return self.epoch + (is_over and self.consumed > 0)

    @property
    def progress(self) -> float:
        """How much of the epoch has been recorded, from 0 to 1."""
        return self.consumed / max(1, self.num_samples_total)

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many samples of it all ranks have taken; the same on every rank."""
        return {"epoch": self.epoch, "consumed": self.consumed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go to where :meth:`state_dict` was taken, at whatever number of ranks. ``len()`` is then what is left."""
        self.epoch = int(state_dict["epoch"])
        self.consumed = self._begin = int(state_dict["consumed"])
        self._is_resumed = True

    def __iter__(self) -> Iterator[int]:
        self._warn_of_repetition()
        total, places = self.num_samples_total, self._places()
        if not self.shuffle:
            return (place % total for place in places)
        # The device is named because a default device of the user's would not accept a generator of the CPU.
        generator = torch.Generator(device="cpu").manual_seed(self.seed + self.epoch)
        order = torch.randperm(total, generator=generator, device="cpu")
        mine = places.start + places.step * torch.arange(len(places), device="cpu")
        ids: list[int] = order[mine % max(1, total)].tolist()
        return iter(ids)

    def __len__(self) -> int:
        """The number of ids on this rank."""
        return len(self._places())

    def __repr__(self) -> str:
        shard = "a shard a rank" if self._shard is None else f"shard {self._shard[1]} of {self._shard[0]}"
        rule = "drop_last" if self.drop_last else "pad" if self.pad else "every id once"
        order = f"shuffled by seed {self.seed}" if self.shuffle else "in order"
        return f"<ShardSampler of {self.num_samples_total} samples, {shard}, {rule}, {order}, epoch {self.epoch}>"

    def _places(self) -> range:
        """Our places in the order; those beyond its end stand for the front again."""
        size, begin = self.num_replicas, self._begin
        left = max(0, self.num_samples_total - begin)
        if self.drop_last:
            left = left // size * size
        elif self.pad:
            left = -(-left // size) * size
        return range(begin + self.rank, begin + left, size)

    def _warn_of_repetition(self) -> None:
        self._passes += 1
        if self.shuffle and not self._epoch_was_set and self._passes == 2 and self.rank == 0:
            logger.warning(
                "a ShardSampler is iterated again and set_epoch() was never called, so every epoch has the same order; "
                "call sampler.set_epoch(epoch) at the start of each epoch"
            )


def _check_shard(num_replicas: int | None, rank: int | None) -> None:
    if (num_replicas is None) != (rank is None):
        raise ValueError(f"num_replicas and rank go together: give both or neither, not {num_replicas} and {rank}")
    if num_replicas is None or rank is None:
        return
    if num_replicas < 1:
        raise ValueError(f"num_replicas must be at least 1, not {num_replicas}")
    if not 0 <= rank < num_replicas:
        raise ValueError(f"rank must lie between 0 and {num_replicas - 1}, not {rank}")
