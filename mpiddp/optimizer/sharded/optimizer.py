"""What an optimizer with ``shard=True`` can do beyond its own class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ...engine import Channel, Engine
from ...errors import MpiddpError
from ...trace import span
from ..arguments import checked_passes
from ..options import Options
from ..scaling import Scaled
from ..wrapped import become
from .gradient import ShardedGradient
from .norm import clip_factor, total_norm
from .parts import Part
from .reducer import ShardedReducer

__all__ = ["wrap_sharded"]


class _Sharded(Scaled):
    """Mixed into the optimizer's class."""

    param_groups: list[dict[str, Any]]
    state: Any

    _mpiddp_reducer: ShardedReducer
    _mpiddp_max_norm: float | None
    _mpiddp_ranks: Sequence[int]
    _mpiddp_whole: dict[Any, Any] | None = None  # the state as consolidated, until the next step
    _mpiddp_whole_on: int | None = None  # on which world rank

    # -- gradients -----------------------------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Gather whole averaged gradients: ``grad`` is a tensor like any other on every rank, and what is then written
        to it is what ``step()`` uses. Collective; costs an all-gather, and is needed to read gradients only."""
        self._mpiddp_reducer.complete()
        self._mpiddp_reducer.make_whole()

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Accepted as in other optimizers: ``step()`` never exchanges twice."""
        yield

    def set_backward_passes_per_step(self, passes: int) -> None:
        """From the next step on, exchange after so many backwards."""
        self._mpiddp_reducer.passes = checked_passes(passes)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the wrapped class's; raises while gradients are being exchanged."""
        reducer = self._mpiddp_reducer
        if reducer.in_flight:
            raise RuntimeError(
                "zero_grad() was called while gradients are being exchanged, since a backward was begun and did "
                "not end; call optimizer.synchronize() first"
            )
        reducer.show_local()
        super().zero_grad(set_to_none)  # type: ignore[misc]
        reducer.forget_passes()

    @torch.no_grad()
    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """Scale the gradients so that the norm of all of them is at most ``max_norm``; return the norm before that.

        What torch.nn.utils.clip_grad_norm_ does with whole gradients, within rounding and the same on every rank.
        Collective; costs one pass over this rank's shards, and another where they are scaled.
        """
        self._mpiddp_reducer.complete()
        reducer = self._mpiddp_reducer
        used = reducer.settle()
        params = [reducer.gradients.params[index] for index in sorted(used)]
        if not all(isinstance(param.grad, ShardedGradient) for param in params) or not params:
            reducer.make_whole()
            return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite)
        parts = reducer.own_shards()
        norm = total_norm(reducer.engine, reducer.lane, parts, norm_type)
        if error_if_nonfinite and not torch.isfinite(norm):
            raise RuntimeError(f"the total norm of order {norm_type} of the gradients is {norm.item()}")
        factor = clip_factor(norm, max_norm)
        if math.isnan(factor):  # which the padding between parameters must not become
            reducer.make_whole()
            torch._foreach_mul_([param.grad for param in params if param.grad is not None], factor)
        elif factor != 1.0:
            torch._foreach_mul_(parts, factor)
        return norm

    # -- parameters ----------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update this rank's shard of the parameters, and gather the others'. Collective."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._mpiddp_reducer.complete()
        if self._mpiddp_max_norm is not None:
            self.clip_grad_norm_(self._mpiddp_max_norm)
        self._mpiddp_whole = None
        self._mpiddp_update()
        self._opt_called = True  # what a scheduler looks for
        return loss

    @torch.no_grad()
    def _mpiddp_update(self) -> None:
        """A bucket travels while the next one is updated."""
        reducer = self._mpiddp_reducer
        layout, weights, update = reducer.layout, reducer.weights, reducer.update
        unused = layout.place.keys() - reducer.settle()
        weights.adopt()
        update.begin(self, reducer.gradients.params, layout, weights)
        under_way = []
        for number in range(len(layout.buckets)):
            with span("update"):
                update.bucket(number, unused, layout, weights)
            under_way.append(reducer.gather_parameters(number))
        for handle in under_way:
            reducer.engine.wait(handle)
        update.end(self)
        reducer.exchanged = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the wrapped class's; the new parameters are sharded too. To be called on every rank."""
        super().add_param_group(param_group)  # type: ignore[misc]
        number, params = len(self.param_groups) - 1, self.param_groups[-1]["params"]
        self._mpiddp_reducer.groups += [number] * len(params)
        self._mpiddp_reducer.add(params, [f"group{number}.{at}" for at in range(len(params))])

    # -- state ---------------------------------------------------------------------------------------------------------

    def consolidate_state_dict(self, to: int | None = 0) -> None:
        """Bring the whole state to rank ``to`` (of the world), or to every rank with None; until the next ``step()``,
        ``state_dict()`` there is what the wrapped class alone would give, for any number of ranks. Collective.

        Raises ValueError where ``to`` is no member of the process set, MpiddpError on every rank where some have loaded
        a state and others have not.
        """
        if to is not None and to not in self._mpiddp_ranks:
            raise ValueError(f"consolidate_state_dict(to={to}): the optimizer's ranks are {list(self._mpiddp_ranks)}")
        reducer = self._mpiddp_reducer
        whole = dict(self.state)
        if reducer.agree_on_pieces():
            member = None if to is None else list(self._mpiddp_ranks).index(to)
            params = reducer.gradients.params
            found = reducer.update.make_whole(reducer.layout, member)
            whole.update({params[index]: state for index, state in found.items()})
        is_receiver = to is None or to == self._mpiddp_ranks[reducer.lane.link.rank]
        self._mpiddp_whole, self._mpiddp_whole_on = (whole if is_receiver else None), to

    def _mpiddp_parts(self) -> list[Part] | None:
        """What this rank holds of the state in pieces; None where no rank does."""
        reducer = self._mpiddp_reducer
        if not reducer.has_state_in_pieces():
            return None
        return reducer.update.parts(reducer.layout, reducer.gradients.names)

    def _mpiddp_rest(self) -> dict[str, Any]:
        """:meth:`state_dict` of what every rank holds, the groups among it."""
        rest: dict[str, Any] = super().state_dict()  # type: ignore[misc]
        return rest

    def state_dict(self) -> dict[str, Any]:
        """The whole state in torch's usual form, where :meth:`consolidate_state_dict` has brought it.

        Raises MpiddpError elsewhere, at once. Before the first step, and after a load, the state is whole anyway.
        """
        with self._mpiddp_whole_state():
            state_dict: dict[str, Any] = super().state_dict()  # type: ignore[misc]
            return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the wrapped class's: a whole state, saved at any number of ranks; each keeps its part at the next step."""
        super().load_state_dict(state_dict)  # type: ignore[misc]
        self._mpiddp_forget_parts()

    def _mpiddp_is_in_pieces(self) -> bool:
        """Whether each rank has a part of the state only."""
        return self._mpiddp_reducer.has_state_in_pieces()

    def _mpiddp_forget_parts(self) -> None:
        """The whole state was replaced: what was made of the one before is out of date."""
        self._mpiddp_reducer.update.forget()
        self._mpiddp_whole = None

    @contextmanager
    def _mpiddp_whole_state(self) -> Iterator[None]:
        """Show the whole state as this optimizer's own; raise where this rank does not have it."""
        reducer = self._mpiddp_reducer
        if self._mpiddp_whole is None and reducer.has_state_in_pieces():
            rank = self._mpiddp_ranks[reducer.lane.link.rank]
            if reducer.lane.link.size > 1:
                raise MpiddpError(
                    f"rank {rank} has a part of the optimizer's state only (shard=True): call "
                    f"optimizer.consolidate_state_dict(to={rank}) on every rank after the last step(), then "
                    f"state_dict() on rank {rank}"
                )
            self.consolidate_state_dict(rank)
        held = self.state
        if self._mpiddp_whole is not None:
            self.state = self._mpiddp_whole
        try:
            yield
        finally:
            self.state = held

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are plain optimizers with the whole state; as :meth:`state_dict`."""
        with self._mpiddp_whole_state():
            return super().__reduce_ex__(protocol)


# LR schedulers wrap step() to see that it is called; ours says so itself, and calls the hooks for steps as torch does.
_Sharded.step = torch.optim.Optimizer.profile_hook_step(_Sharded.step)  # type: ignore[method-assign]
_Sharded.step.hooked = True  # type: ignore[attr-defined]
_Sharded.step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def wrap_sharded(
    optimizer: Any,
    engine: Engine,
    channel: Channel,
    names: Sequence[str],
    passes: int,
    options: Options,
    max_norm: float | None,
) -> torch.optim.Optimizer:
    """Make ``optimizer`` update one shard of its parameters."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    groups = [number for number, group in enumerate(optimizer.param_groups) for _ in group["params"]]
    reducer = ShardedReducer(engine, channel, params, names, passes, options, groups, optimizer)
    become(optimizer, _Sharded)
    optimizer.__dict__.pop("step", None)  # a scheduler's, over the plain class's
    optimizer._step_supports_amp_scaling = False  # a GradScaler unscales first, and asks all ranks for infinities
    optimizer._mpiddp_reducer, optimizer._mpiddp_max_norm = reducer, max_norm
    optimizer._mpiddp_ranks = channel.ranks
    return optimizer  # type: ignore[no-any-return]
