"""Gradients on their way: hook -> bucket -> exchange -> the same bucket, averaged.

A gradient is copied once, into its bucket, by the hook that fires when autograd has accumulated it. A bucket is
exchanged as soon as it is full, in an order on which the ranks agreed, while backward goes on; the last one when
backward ends, since it tells the others whether anything unusual happened. While a bucket is under way its
parameters' ``grad`` is None, so that nobody reads or adds to what the exchange is writing; when backward returns,
``grad`` is a view of the bucket again.

State: all of it belongs to the thread that runs backward. Autograd has a thread for each device, so with parameters on
several of them hooks come from several at once: ``turn`` lets one in.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..engine import Channel, Engine
from ..errors import MpiddpError
from ..memory.heap import keep_freed
from ..trace import span
from .agreement import agree_on_order, agree_on_trained
from .autograd import BackwardEnd
from .callers import caller, mirror
from .gradients import Gradients
from .hooks import watch_gradient
from .layout import Bucket, Layout, read_tails, shared_zeros
from .network import suited
from .options import Options
from .sparse import gather_sparse
from .wire import Sending, Wire

__all__ = ["Reducer"]


class Reducer:
    """Averages (or sums) the gradients of ``params`` over the members of ``channel``."""

    def __init__(
        self,
        engine: Engine,
        channel: Channel,
        params: Sequence[torch.Tensor],
        names: Sequence[str],
        passes: int,
        options: Options,
        wire: type[Wire] = Wire,
        lay_out: Callable[[Sequence[torch.Tensor]], Layout] = Layout,
    ) -> None:
        self.engine, self.lane, self.passes = engine, channel.lane(), passes
        self.turn = threading.RLock()
        self.gradients = Gradients(options.sparse_as_dense, options.may_repeat, lay_out)
        self.gradients.layout.zeros = shared_zeros(channel.link)  # gradients are reduced where they lie
        self._options = options
        self.wire = wire(self.lane, options)
        if any(param.is_cpu for param in params):
            keep_freed(options.heap_nbytes)
        self._end = BackwardEnd(self._backward_ending, self._backward_ended)
        self._agreed = self._order_agreed = False
        # One cycle: from an exchange to the next.
        self._arrived: dict[int, None] = {}  # in the order of arrival
        self._missing: list[int] = []  # of each bucket, how many gradients have not come
        self._under_way: list[Sending] = []  # the buckets that were launched, in order
        self._passes_done = 0
        self._is_joined = False
        self.exchanged = False  # since the last step, and since gradients came or were zeroed
        this = weakref.ref(self)
        self.lane.mirror = lambda: mirror(this)
        self.add(params, names)

    # -- parameters ----------------------------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """Where the gradients lie."""
        return self.gradients.layout

    def add(self, params: Sequence[torch.Tensor], names: Sequence[str]) -> None:
        """Further parameters; the ranks agree anew before the next exchange."""
        this = weakref.ref(self)
        for param, name in zip(params, names, strict=True):
            index = self.gradients.add(param, name)
            came, coming = (caller(this, index, hook) for hook in ("gradient_came", "gradient_comes"))
            watch_gradient(param, came, None if self._options.may_repeat else coming)
        self._agreed = self._order_agreed = False

    def _agree(self) -> None:
        """Before the first exchange, and after a change: who trains what, and so what lies where."""
        if not self._agreed:
            self._open_cycle()
            found = self.gradients
            trained, found.sparse = agree_on_trained(self.engine, self.lane, found.names, found.params, found.sparse)
            # Gradients become ready roughly from the last parameter to the first.
            order = [index for index in reversed(range(len(found.params))) if index in trained - found.sparse]
            nbytes = sum(found.params[index].nbytes for index in order)
            self._options = suited(self.engine, self.lane, self._options, nbytes)
            self._lay_out(order)
            self._agreed = True

    def _open_cycle(self) -> None:
        if not self.lane.is_in_cycle:
            self.lane.begin_cycle()

    def _lay_out(self, order: Sequence[int]) -> None:
        options = self._options
        if self.wire.is_own:  # it gets each gradient by itself
            options = replace(options, first_nbytes=-1, bucket_nbytes=-1, groups={})
        self.layout.renew(order, options.first_nbytes, options.bucket_nbytes, options.groups)
        self._missing = [len(bucket.indices) for bucket in self.layout.buckets]
        self.gradients.watch_streams(self.lane.link.ways.devices)

    # -- during backward -----------------------------------------------------------------------------------------------

    def gradient_came(self, index: int) -> None:
        """Autograd has accumulated into the parameter's ``grad``."""
        self._end.watch()
        self.exchanged = False
        self._agree()
        bucket = self.gradients.find_place(index)
        if bucket is not None and bucket < len(self._under_way):
            self.gradients.keep_late(index)
            return
        self._check_second_backward(index)
        if bucket is None:
            return
        self.gradients.take(index)
        if self._passes_done + 1 < self.passes:
            return
        if index not in self._arrived:
            self._arrived[index] = None
            self._missing[bucket] -= 1
            self._launch_full()
        if self._under_way:
            self.engine.push()

    def gradient_comes(self, index: int) -> None:
        """Autograd is about to accumulate: what was zeroed in place holds no exchanged value any more."""
        self.gradients.forget_zeros(index)

    def _check_second_backward(self, index: int) -> None:
        if not self._options.may_repeat and self.lane.link.size > 1 and self.gradients.holds_exchanged(index):
            raise MpiddpError(
                f"a second backward added to the gradient of {self.gradients.names[index]!r}, which holds an "
                "exchanged value already; with op=Sum, or with passes averaged, the two cannot be told apart. Call "
                "optimizer.zero_grad() first, or accumulate with backward_passes_per_step"
            )

    def _launch_full(self) -> None:
        """Launch what is full, in order. The last bucket waits for the end, whatever comes in it."""
        while (number := len(self._under_way)) < len(self.layout.buckets) - 1 and self._missing[number] == 0:
            self._launch(number, self.passes)

    def _launch(self, number: int, passes: int) -> None:
        self._open_cycle()
        bucket = self.layout.buckets[number]
        self.gradients.fill(bucket, with_nothing=self._is_joined)
        if number == len(self.layout.buckets) - 1 and (self.gradients.late or self.gradients.unplaced):
            bucket.control.copy_(torch.tensor([bool(self.gradients.late), self.gradients.unplaced], device="cpu"))
        self._under_way.append(self.wire.launch(f"bucket {number}", bucket, 1.0 / self._divisor(passes)))

    def _launch_rest(self, passes: int) -> None:
        while len(self._under_way) < len(self.layout.buckets):
            self._launch(len(self._under_way), passes)

    def _divisor(self, passes: int) -> int:
        return passes if self._options.average_passes else 1

    # -- at the end of backward ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _backward_ending(self) -> None:
        self._passes_done += 1
        if self._passes_done >= self.passes:
            self._launch_rest(self._passes_done)

    def _backward_ended(self) -> None:
        if self._passes_done >= self.passes:
            self.finish()

    @property
    def in_flight(self) -> bool:
        """Whether buckets are under way: a backward was begun and has not ended."""
        return bool(self._under_way)

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing to exchange: the same on every rank."""
        return self.exchanged and not self.in_flight

    def complete(self) -> None:
        """:meth:`finish`, unless that is done."""
        if not self.is_complete:
            self.finish()

    @torch.no_grad()
    def finish(self) -> None:
        """Exchange what has not been exchanged and wait for all: every gradient is averaged when this returns."""
        self._end.forget()
        if self._agreed and not self.layout.buckets:
            self._agreed = False  # nobody could say in a bucket that there is a gradient now
        self._agree()
        try:
            self._drain()
        finally:
            self._begin_cycle()
        self.exchanged = True

    def forget_passes(self) -> None:
        """The gradients were zeroed: what was accumulated is gone."""
        self._passes_done = 0
        self.exchanged = False
        self.gradients.forget()

    def take_part_without_data(self) -> None:
        """This rank has joined: contribute zeros to the others' step, and leave its own parameters as they are."""
        self._is_joined = True
        try:
            self.finish()
        finally:
            self._is_joined = False
            for param in self.gradients.params:
                param.grad = None

    def _begin_cycle(self) -> None:
        self.lane.end_cycle()
        self._missing = [len(bucket.indices) for bucket in self.layout.buckets]
        self._arrived.clear()
        self._under_way.clear()
        self.gradients.end_cycle()
        self._passes_done = 0

    def _drain(self) -> None:
        passes = max(1, self._passes_done)
        if not self.layout.buckets:
            self.gradients.averaged.clear()
            self._exchange_sparse(passes)
            return
        self._launch_rest(passes)
        with span("drain"), self.lane.waiting():
            for sending in self._under_way:
                sending.turn(self.engine)
            for sending in self._under_way:
                sending.wait(self.engine)
        self.gradients.averaged.clear()
        self.gradients.add_kept()
        for bucket, tail in zip(self.layout.buckets, read_tails(self.layout.buckets), strict=True):
            late, relayout = self.gradients.hand_out(bucket, tail)  # the last one's count
        if relayout:
            self._place_newcomers()
        if late or relayout:
            self._exchange_late(passes)
        self._exchange_sparse(passes)
        if not self._order_agreed:
            self._follow_observed_order()

    # -- what happens seldom -------------------------------------------------------------------------------------------

    def _place_newcomers(self) -> None:
        """Some rank got a gradient for a parameter that nobody trained when the layout was made."""
        placed = set(self.layout.place)
        self._agreed = False
        self._agree()
        if not self._is_joined:
            self.gradients.make_late(self.layout.place.keys() - placed)

    def _exchange_late(self, passes: int) -> None:
        """Exchange what came too late for the buckets, apart from what they hold, and add it."""
        for number, bucket in enumerate(self.layout.buckets):
            extra = Bucket.over(bucket.indices, self.gradients.params)
            self.gradients.fill_late(extra)
            self.wire.launch(f"late bucket {number}", extra, 1.0 / self._divisor(passes)).wait(self.engine)
            self.gradients.add_late(bucket, extra)

    def _exchange_sparse(self, passes: int) -> None:
        """Gradients that are sparse do not lie in buckets."""
        indices = sorted(self.gradients.sparse)
        if not indices:
            return
        self._open_cycle()
        params = [self.gradients.params[index] for index in indices]
        own = self.gradients.to_gather(indices, self._is_joined, self._divisor(passes))
        scale = 1.0 / self.lane.link.size if self._options.average else 1.0
        for index, whole in zip(indices, gather_sparse(self.engine, self.lane, params, own, scale), strict=True):
            self.gradients.take_gathered(index, whole)

    def _follow_observed_order(self) -> None:
        """Lay the buckets out in the order in which rank 0's gradients came."""
        order = self._observed_order()
        if order != self.layout.order():
            self._lay_out(order)

    def _observed_order(self) -> list[int]:
        came = [index for index in self._arrived if index in self.layout.place]
        rest = [index for index in self.layout.order() if index not in self._arrived]
        self._order_agreed = True
        return agree_on_order(self.engine, self.lane, came + rest)
