"""Gradients on their way to the owners of their shards.

As in the unsharded reducer, but a bucket is reduced and scattered: afterwards this rank's shard of it is right, the
rest is undefined, and ``param.grad`` is a :class:`ShardedGradient`. What happens seldom (new buckets, synchronize())
gathers whole gradients first and then goes the unsharded way.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from ...collectives.base import chunk_bounds
from ...engine import Channel, Engine, Handle
from ...errors import MpiddpError
from ...trace import span
from ..agreement import gather_objects
from ..layout import Bucket, read_tails
from ..options import Options
from ..reducer import Reducer
from .flat import ShardLayout, Weights, extents
from .gradient import ShardedGradient
from .norm import unscale
from .update import Update
from .wire import ShardWire

__all__ = ["ShardedReducer"]


class ShardedReducer(Reducer):
    """State: belongs to the thread that runs backward and step. ``groups`` is the optimizer's group of each
    parameter."""

    wire: ShardWire

    def __init__(
        self,
        engine: Engine,
        channel: Channel,
        params: Sequence[torch.Tensor],
        names: Sequence[str],
        passes: int,
        options: Options,
        groups: Sequence[int],
        optimizer: Any,
    ) -> None:
        self.groups = list(groups)
        self._held: set[int] = set()  # the parameters whose gradient lay in shards after the last exchange
        self._is_open = False  # a cycle has begun: what was held has been kept
        self._kept: list[torch.Tensor] = []  # this rank's shards of it, one a bucket
        self._shown: dict[int, ShardedGradient] = {}  # what ``grad`` is then
        self._own: dict[int, torch.Tensor] = {}  # this rank's part of each gradient that it has a part of
        group_of = self.groups.__getitem__  # of the list, which grows
        lay_out = partial(ShardLayout, shards=channel.link.size, group_of=group_of)
        super().__init__(engine, channel, params, names, passes, options, ShardWire, lay_out)
        self.weights = Weights(self.gradients.params, self.gradients.names)
        self.update = Update(optimizer, engine, self.lane)
        self._optimizer = weakref.ref(optimizer)
        this = weakref.ref(self)
        self.lane.mirror = None
        self.lane.refusal = lambda: None if this() is None else _JOIN

    @property
    def layout(self) -> ShardLayout:
        """Where the gradients lie."""
        layout = self.gradients.layout
        assert isinstance(layout, ShardLayout)
        return layout

    # -- a cycle -------------------------------------------------------------------------------------------------------

    def gradient_came(self, index: int) -> None:
        """Autograd has accumulated into the parameter's ``grad``."""
        self._open()
        super().gradient_came(index)

    def _open(self) -> None:
        """The buckets are about to be filled anew: keep, apart, this rank's shards of what has not been zeroed."""
        if self._is_open:
            return
        self._is_open = True
        params = self.gradients.params
        held = {index for index in self._held if isinstance(params[index].grad, ShardedGradient)}
        if held:
            self._zero(self._held - held)
            self._kept = [self.wire.own(bucket.data).clone() for bucket in self.layout.buckets]
        for index in held:
            gradient = params[index].grad
            assert isinstance(gradient, ShardedGradient)
            params[index].grad, gradient.added = gradient.added, None
        self._held = held

    def _zero(self, indices: set[int]) -> None:
        for index in indices:
            self.layout.view(index).zero_()

    def zero(self, index: int) -> None:
        """As :class:`~.gradient.Holder` says."""
        self._zero({index})

    def forget_passes(self) -> None:
        """The gradients were zeroed."""
        super().forget_passes()
        self._held.clear()
        self._kept.clear()

    def _begin_cycle(self) -> None:
        super()._begin_cycle()
        self._is_open = False
        self._kept.clear()

    def _drain(self) -> None:
        self._open()
        passes = max(1, self._passes_done)
        buckets = self.layout.buckets
        if not buckets:
            return
        self._launch_rest(passes)
        with span("drain"), self.lane.waiting():
            for sending in self._under_way:
                sending.wait(self.engine)
        self.gradients.averaged.clear()
        self.gradients.add_kept()
        tails = read_tails(buckets)
        held = self._held | {index for each in zip(buckets, tails, strict=True) for index in _flagged(*each)}
        for kept, bucket in zip(self._kept, buckets, strict=False):
            self.wire.own(bucket.data).add_(kept)
        late, relayout = (value != 0 for value in tails[-1][-2:])
        if relayout or not self._order_agreed:
            self._renew(held, relayout)
        if late or relayout:
            held |= self._exchange_late_shards(passes)
        self._hold(held)

    def _renew(self, held: set[int], relayout: bool) -> None:
        """New buckets, where newcomers or the order in which gradients come ask for them."""
        if relayout:
            self._spread(held)
            self._place_newcomers()
            return
        order = self._observed_order()
        if order != self._planned:
            self._spread(held)
            self._lay_out(order)

    def _exchange_late_shards(self, passes: int) -> set[int]:
        came: set[int] = set()
        for number, bucket in enumerate(self.layout.buckets):
            extra = Bucket.over(bucket.indices, self.gradients.params, shards=self.layout.shards)
            self.gradients.fill_late(extra)
            self.wire.launch(f"late bucket {number}", extra, 1.0 / self._divisor(passes)).wait(self.engine)
            self.wire.own(bucket.data).add_(self.wire.own(extra.data))
            came |= _flagged(extra, *read_tails([extra]))
        return came

    def _hold(self, held: set[int]) -> None:
        """Show that the gradients lie in shards; on a single rank the shard is the whole."""
        gradients = self.gradients
        self._held = held
        for index in held:
            param = gradients.params[index]
            if self.lane.link.size == 1:
                param.grad = self.layout.view(index)
                gradients.averaged.add(index)
            else:
                self._shown[index].added = None
                param.grad = self._shown[index]

    # -- whole gradients -----------------------------------------------------------------------------------------------

    def _spread(self, held: set[int]) -> None:
        """Gather the shards: ``grad`` is a view of its bucket with the averaged gradient, on every rank. Collective."""
        gathers = [self.wire.gather(f"gradients {n}", bucket) for n, bucket in enumerate(self.layout.buckets)]
        for handle in gathers:
            self.engine.wait(handle)
        for index in held:
            self.gradients.params[index].grad = self.layout.view(index)
            self.gradients.averaged.add(index)

    @torch.no_grad()
    def make_whole(self) -> None:
        """Whole gradients instead of shards. Collective."""
        params = self.gradients.params
        held = {index for index in self._held if isinstance(params[index].grad, ShardedGradient)}
        if held:
            self._spread(held)
        self._held.clear()

    def show_local(self) -> None:
        """Before gradients are zeroed in place: ``grad`` is a view of its bucket, of whatever value."""
        for index in self._held:
            param = self.gradients.params[index]
            if isinstance(param.grad, ShardedGradient):
                param.grad = self.layout.view(index)

    def add(self, params: Sequence[torch.Tensor], names: Sequence[str]) -> None:
        """Further parameters; the ranks agree anew before the next exchange, and buckets are laid out anew."""
        if self._held:
            self.make_whole()
        super().add(params, names)

    # -- parameters ----------------------------------------------------------------------------------------------------

    def _agree(self) -> None:
        if self._agreed:
            return
        super()._agree()
        if self.gradients.sparse:
            self._agreed = False  # so that the ranks meet here again, and all raise again
            name = self.gradients.names[min(self.gradients.sparse)]
            raise ValueError(
                f"the gradient of {name!r} is sparse, and shard=True cuts flat dense ones: use "
                "Embedding(sparse=False), or sparse_as_dense=True"
            )

    @torch.no_grad()
    def _lay_out(self, order: Sequence[int]) -> None:
        if self.agree_on_pieces():
            self.update.relieve(self._optimizer(), self.gradients.params, self.layout)
        self.update.forget()
        self._planned = list(order)
        super()._lay_out(order)
        self.weights.renew(self.layout)
        params, names = self.gradients.params, self.gradients.names
        self._shown = {i: ShardedGradient.over(params[i], self, i, names[i]) for i in self.layout.place}
        self._own = {i: part for bucket in self.layout.buckets for i, part in self._own_parts(bucket)}

    def has_state_in_pieces(self) -> bool:
        """Whether the optimizer's state is in pieces; False where it is whole, since it was loaded or is not there."""
        optimizer: Any = self._optimizer()
        loaded = any(optimizer.state.get(self.gradients.params[index]) for index in self.layout.place)
        return self.update.is_cut and not loaded

    def agree_on_pieces(self) -> bool:
        """:meth:`has_state_in_pieces`, which must be the same everywhere. Collective.

        Raises MpiddpError on every rank where some have loaded a state and others have not.
        """
        everyone: list[bool] = gather_objects(self.engine, self.lane, self.has_state_in_pieces())
        if len(set(everyone)) == 1:
            return everyone[0]
        ranks = self.lane.channel.ranks
        loaded = [rank for rank, in_pieces in zip(ranks, everyone, strict=True) if not in_pieces]
        raise MpiddpError(
            f"load_state_dict() was called on ranks {loaded} and not on the others, which keep their parts of another "
            "state (shard=True): call it on every rank, or call broadcast_optimizer_state() on every rank after it"
        )

    # -- what is done to shards ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def settle(self) -> set[int]:
        """Bring what the user wrote to ``grad`` to the buckets; return the parameters that have a gradient."""
        used = set()
        for index in self.layout.place:
            gradient = self.gradients.params[index].grad
            if gradient is not None:
                used.add(index)
                if not isinstance(gradient, ShardedGradient):
                    self.gradients.adopt(index)
        self._zero(self._held - used)
        self._held &= used
        return used

    def own_shards(self) -> list[torch.Tensor]:
        """This rank's shard of each bucket's gradients; zeros where there is none."""
        return [self.wire.own(bucket.data) for bucket in self.layout.buckets]

    def unscale(self, indices: Sequence[int], found_inf: torch.Tensor, inv_scale: torch.Tensor) -> None:
        """As :class:`~.gradient.Holder` says. Collective; all members' parameters have gradients alike."""
        parts = [self._own[index] for index in indices if index in self._own]
        unscale(self.engine, self.lane, parts, found_inf, inv_scale)

    def _own_parts(self, bucket: Bucket) -> Iterator[tuple[int, torch.Tensor]]:
        lo, hi = chunk_bounds(bucket.data.numel(), self.layout.shards)[self.lane.link.rank]
        for index, (begin, end) in zip(bucket.indices, extents(bucket), strict=True):
            if max(lo, begin) < min(hi, end):
                yield index, bucket.data[max(lo, begin) : min(hi, end)]

    def gather_parameters(self, number: int) -> Handle:
        """Every rank's shard of the parameters of a bucket is on its way to all ranks."""
        handle = self.wire.gather(f"parameters {number}", self.weights.buckets[number])
        self.engine.push()
        return handle


def _flagged(bucket: Bucket, tail: Sequence[float]) -> set[int]:
    """The parameters that had a gradient on some rank; ``tail`` is what came in the bucket's."""
    return {index for index, flag in zip(bucket.indices, tail, strict=False) if flag != 0}


_JOIN = (
    "join() cannot be used together with DistributedOptimizer(..., shard=True): a rank that has joined would still own "
    "a shard that nobody else can update. Give every rank as many batches, or use shard=False"
)
