"""Gradients on their way: hook -> bucket -> exchange -> the same bucket, averaged.

A gradient is copied once, into its bucket, by the hook that fires when autograd has accumulated it. A bucket is
exchanged as soon as it is full, in an order on which the ranks agreed, while backward goes on; the last one when
backward ends, since it tells the others whether anything unusual happened. While a bucket is under way its
parameters' ``grad`` is None, so that nobody reads or adds to what the exchange is writing; when backward returns,
``grad`` is a view of the bucket again.

State: all of it belongs to the thread that runs backward; autograd calls hooks one at a time.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..collectives import ReduceOp, select
from ..engine import Channel, Engine, Handle
from ..engine.execute import through_host
from ..errors import MpiddpError
from ..trace import span
from ..transport.base import Link, Steps
from .agreement import agree_on_order, agree_on_trained
from .autograd import BackwardEnd
from .layout import Bucket, plan

__all__ = ["Reducer"]


class Reducer:
    """Averages (or sums) the gradients of ``params`` over the members of ``channel``."""

    def __init__(
        self,
        engine: Engine,
        channel: Channel,
        params: Sequence[torch.Tensor],
        names: Sequence[str],
        *,
        average: bool,
        passes: int,
        average_passes: bool,
        bucket_nbytes: int,
        first_nbytes: int,
        segment_nbytes: int,
    ) -> None:
        self.engine = engine
        self.lane = engine.lane(channel)
        self.params: list[torch.Tensor] = []
        self.names: list[str] = []
        self.passes = passes
        self._average = average
        self._average_passes = average_passes
        self._sizes = (first_nbytes, bucket_nbytes)
        self._segment_nbytes = segment_nbytes
        self._end = BackwardEnd(self._backward_ended)
        # The layout, and what goes with it.
        self.buckets: list[Bucket] = []
        self._place: dict[int, tuple[int, int]] = {}  # parameter -> its bucket, and where in it
        self._agreed = False
        self._order_agreed = False
        # One cycle: from an exchange to the next.
        self._arrived: dict[int, None] = {}  # in the order of arrival
        self._missing: list[int] = []  # of each bucket, how many gradients have not come
        self._under_way: list[Handle] = []  # of the buckets that were launched, in order
        self._late: dict[int, torch.Tensor] = {}
        self._unplaced = False
        self._passes_done = 0
        self._averaged: set[int] = set()  # whose gradient holds an exchanged value
        self.exchanged = False  # since the last step
        self.add(params, names)

    # -- parameters ----------------------------------------------------------------------------------------------------

    def add(self, params: Sequence[torch.Tensor], names: Sequence[str]) -> None:
        """Further parameters; the ranks agree anew before the next exchange."""
        this = weakref.ref(self)
        for param, name in zip(params, names, strict=True):
            index = len(self.params)
            self.params.append(param)
            self.names.append(name)
            _hook(param, index, this)
        self._agreed = self._order_agreed = False

    def _agree(self) -> None:
        """Before the first exchange, and after a change: who trains what, and so what lies where."""
        if not self._agreed:
            trained = agree_on_trained(self.engine, self.lane, self.names, self.params)
            # Gradients become ready roughly from the last parameter to the first.
            self._lay_out([index for index in reversed(range(len(trained))) if trained[index]])
            self._agreed = True

    def _lay_out(self, order: Sequence[int]) -> None:
        """New buckets for the parameters of ``order``; gradients that lie in the old ones move."""
        params = self.params
        nbytes = [param.numel() * param.element_size() for param in params]
        kinds = [(param.dtype, param.device) for param in params]
        groups = plan(nbytes, kinds, order, *self._sizes)
        held = {index: params[index].grad for index in order if self._in_place(index)}
        self.buckets, self._place = [], {}
        for number, group in enumerate(groups):
            bucket = Bucket.over(group, params)
            self.buckets.append(bucket)
            for at, index in enumerate(group):
                self._place[index] = (number, at)
                grad = held.pop(index, None)
                if grad is not None:
                    bucket.views[at].copy_(grad)
                    params[index].grad = bucket.views[at]
        self._missing = [len(bucket.indices) for bucket in self.buckets]

    def _view(self, index: int) -> torch.Tensor:
        number, at = self._place[index]
        return self.buckets[number].views[at]

    def _in_place(self, index: int) -> bool:
        return index in self._place and self.params[index].grad is self._view(index)

    # -- during backward -----------------------------------------------------------------------------------------------

    def gradient_came(self, index: int) -> None:
        """Autograd has accumulated into ``params[index].grad``."""
        self._end.watch()
        self._agree()
        place = self._place.get(index)
        if place is None:
            self._unplaced = True  # it began to be trained after the layout was made
            return
        if place[0] < len(self._under_way):
            self._keep_late(index)
            return
        if index in self._averaged:
            self._check_second_backward(index)
        self._adopt(index)
        if self._passes_done + 1 < self.passes:
            return
        if index not in self._arrived:
            self._arrived[index] = None
            self._missing[place[0]] -= 1
            self._launch_full()
        if self._under_way:
            self.engine.push()

    def _check_second_backward(self, index: int) -> None:
        """Exchanging what another backward added to an average gives the right average again; to a sum it does not."""
        if self._in_place(index) and not (self._average and not self._average_passes) and self.lane.link.size > 1:
            raise MpiddpError(
                f"a second backward added to the gradient of {self.names[index]!r}, which holds an exchanged "
                "value already; with op=Sum, or with passes averaged, the two cannot be told apart. Call "
                "optimizer.zero_grad() first, or accumulate with backward_passes_per_step"
            )

    def _adopt(self, index: int) -> None:
        """Make the gradient a view of its bucket: the only copy that is ever made of it."""
        param, view = self.params[index], self._view(index)
        grad = param.grad
        if grad is view or grad is None:
            return
        if grad.layout is not torch.strided:
            raise ValueError(
                f"parameter {self.names[index]!r} has a sparse gradient, which cannot lie in a bucket; build its "
                "layer with sparse=False"
            )
        view.copy_(grad)
        param.grad = view

    def _keep_late(self, index: int) -> None:
        """A second gradient in one backward (shared by reentrant checkpoints) while the first one is under way."""
        grad = self.params[index].grad
        assert grad is not None
        self.params[index].grad = None
        self._late[index] = self._late[index] + grad if index in self._late else grad.detach().clone()

    def _launch_full(self) -> None:
        """Launch what is full, in order. The last bucket waits for the end, whatever comes in it."""
        while (number := len(self._under_way)) < len(self.buckets) - 1 and self._missing[number] == 0:
            self._launch(number, self.passes)

    def _launch(self, number: int, passes: int) -> None:
        bucket = self.buckets[number]
        present = []
        for at, index in enumerate(bucket.indices):
            self._adopt(index)
            param = self.params[index]
            present.append(param.grad is not None)
            if param.grad is None:
                bucket.views[at].zero_()
            param.grad = None
        if number == len(self.buckets) - 1:
            bucket.control.copy_(torch.tensor([bool(self._late), self._unplaced]))
        bucket.flags.copy_(torch.tensor(present))
        if self._average_passes and passes > 1:
            bucket.flat.mul_(1.0 / passes)
        self._under_way.append(self._exchange(f"bucket {number}", bucket.flat))

    def _exchange(self, name: str, flat: torch.Tensor) -> Handle:
        scale = 1.0 / self.lane.link.size if self._average else 1.0
        segment = self._segment_nbytes

        def start(link: Link, tag: int) -> Steps:
            return through_host(flat, lambda host: select.allreduce(link, host, ReduceOp.SUM, tag, scale, segment))

        return self.lane.launch(name, start)

    # -- at the end of backward ----------------------------------------------------------------------------------------

    def _backward_ended(self) -> None:
        self._passes_done += 1
        if self._passes_done >= self.passes:
            self.finish()

    @property
    def in_flight(self) -> bool:
        """Whether buckets are under way: a backward was begun and has not ended."""
        return bool(self._under_way)

    @torch.no_grad()
    def finish(self) -> None:
        """Exchange what has not been exchanged and wait for all: every gradient is averaged when this returns."""
        self._end.forget()
        self._agree()
        try:
            self._drain()
        finally:
            self._begin_cycle()
        self.exchanged = True

    def forget_passes(self) -> None:
        """The gradients were zeroed: what was accumulated is gone."""
        self._passes_done = 0
        self._averaged.clear()

    def _begin_cycle(self) -> None:
        self._missing = [len(bucket.indices) for bucket in self.buckets]
        self._arrived.clear()
        self._under_way.clear()
        self._late.clear()
        self._unplaced = False
        self._passes_done = 0

    def _drain(self) -> None:
        if not self.buckets:
            return
        passes = max(1, self._passes_done)
        while len(self._under_way) < len(self.buckets):
            self._launch(len(self._under_way), passes)
        with span("drain"):
            for handle in self._under_way:
                self.engine.wait(handle)
        self._averaged.clear()
        for bucket in self.buckets:
            self._hand_out(bucket)
        late, relayout = (value != 0 for value in self.buckets[-1].control.tolist())
        if relayout:
            self._place_newcomers()
        if late or relayout:
            self._exchange_late()
        if not self._order_agreed:
            self._follow_observed_order()

    def _hand_out(self, bucket: Bucket) -> None:
        """``grad`` is a view again, where some rank had a gradient; a parameter without one anywhere keeps None."""
        for index, view, flag in zip(bucket.indices, bucket.views, bucket.flags.tolist(), strict=True):
            if flag != 0:
                self.params[index].grad = view
                self._averaged.add(index)

    # -- what happens seldom
    # ---------------------------------------------------------------------------------------------

    def _place_newcomers(self) -> None:
        """Some rank got a gradient for a parameter that nobody trained when the layout was made."""
        placed = set(self._place)
        self._agreed = False
        self._agree()
        for index in self._place.keys() - placed:
            grad = self.params[index].grad
            if grad is not None:
                self._late[index] = grad
                self.params[index].grad = None

    def _exchange_late(self) -> None:
        """Exchange what came too late for the buckets, apart from what they hold, and add it."""
        for number, bucket in enumerate(self.buckets):
            extra = Bucket.over(bucket.indices, self.params)
            for at, index in enumerate(bucket.indices):
                if index in self._late:
                    extra.views[at].copy_(self._late[index])
            extra.flags.copy_(torch.tensor([index in self._late for index in bucket.indices]))
            self.engine.wait(self._exchange(f"late bucket {number}", extra.flat))
            for at, (index, flag) in enumerate(zip(bucket.indices, extra.flags.tolist(), strict=True)):
                if flag == 0:
                    continue
                if self.params[index].grad is None:
                    bucket.views[at].zero_()
                bucket.views[at].add_(extra.views[at])
                self.params[index].grad = bucket.views[at]
                self._averaged.add(index)

    def _follow_observed_order(self) -> None:
        """Lay the buckets out in the order in which rank 0's gradients came."""
        came = [index for index in self._arrived if index in self._place]
        guess = [index for bucket in self.buckets for index in bucket.indices]
        order = agree_on_order(self.engine, self.lane, came + [index for index in guess if index not in self._arrived])
        if order != guess:
            self._lay_out(order)
        self._order_agreed = True


#: The hook of each parameter. A parameter that is wrapped again belongs to the newer wrapper.
_registered: Any = WeakIdKeyDictionary()


def _hook(param: torch.Tensor, index: int, this: weakref.ref[Reducer]) -> None:
    """Tell the reducer, if it still lives and this is the process that made it, of each gradient of ``param``."""
    pid = os.getpid()

    def came(_: torch.Tensor) -> None:
        reducer = this()
        if reducer is None or os.getpid() != pid:
            return
        if torch.is_grad_enabled():  # backward(create_graph=True)
            with torch.no_grad():
                reducer.gradient_came(index)
        else:
            reducer.gradient_came(index)

    earlier = _registered.pop(param, None)
    if earlier is not None:
        earlier.remove()
    trained = param.requires_grad
    if not (param.is_floating_point() or param.is_complex()):
        return
    try:
        param.requires_grad_(True)  # a frozen parameter takes no hook, and may be trained later
        _registered[param] = param.register_post_accumulate_grad_hook(came)  # type: ignore[no-untyped-call]
    finally:
        param.requires_grad_(trained)
