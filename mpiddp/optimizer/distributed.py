"""``DistributedOptimizer``: the user's own optimizer, whose gradients are averaged over the ranks when backward
returns."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .. import runtime
from ..compression import Compression
from ..engine import Channel, Engine
from ..op import Adasum, Average, Op
from ..ops.submit import channel_of
from ..process_set import ProcessSet, global_process_set
from .adasum import wrap_adasum
from .arguments import check_optimizer, check_ordered, checked_passes, groups_by_position, names_of
from .clipping import check_max_norm, clip_before_steps
from .closures import Arguments, closure_of, followed_by
from .options import Options
from .powersgd import Remembering, check_powersgd, ways_of
from .reducer import Reducer
from .scaling import Scaled, check_found
from .sharded import check_shardable, wrap_sharded
from .wrapped import Alone, become

__all__ = ["DistributedOptimizer"]


class _Distributed(Scaled, Remembering):
    """What a wrapped optimizer can do beyond its own class. Mixed into a subclass of that class."""

    _mpiddp_synchronized = False

    def synchronize(self) -> None:
        """Have every gradient averaged now. Needed only in scripts that say so; backward has done it as a rule."""
        self._mpiddp_reducer.complete()
        self._mpiddp_synchronized = True

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """torch.nn.utils.clip_grad_norm_ of the averaged gradients: the same on every rank."""
        self._mpiddp_reducer.complete()
        return super().clip_grad_norm_(max_norm, norm_type, error_if_nonfinite)

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """``step()`` inside does not synchronize; to be used after an explicit ``synchronize()``."""
        self._mpiddp_skip = True
        try:
            yield
        finally:
            self._mpiddp_skip = False

    def set_backward_passes_per_step(self, passes: int) -> None:
        """From the next step on, exchange after so many backwards."""
        self._mpiddp_reducer.passes = checked_passes(passes)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """As the wrapped class's; raises while gradients are being exchanged."""
        if self._mpiddp_reducer.in_flight:
            raise RuntimeError(
                "zero_grad() was called while gradients are being exchanged, since a backward was begun and did "
                "not end; call optimizer.synchronize() first"
            )
        super().zero_grad(*args, **kwargs)  # type: ignore[misc]
        self._mpiddp_reducer.forget_passes()
        self._mpiddp_synchronized = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the wrapped class's; the new parameters' gradients are averaged too. To be called on every rank."""
        super().add_param_group(param_group)  # type: ignore[misc]
        groups = self.param_groups  # type: ignore[attr-defined]
        params = groups[-1]["params"]
        self._mpiddp_reducer.add(params, [f"group{len(groups) - 1}.{i}" for i in range(len(params))])


def DistributedOptimizer(  # noqa: N802 - the name that scripts know
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None,
    compression: Any = Compression.none,
    backward_passes_per_step: int = 1,
    op: Op = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | Sequence[Sequence[torch.Tensor]] | None = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
    *,
    average_aggregated_gradients: bool = False,
    shard: bool = False,
    max_grad_norm: float | None = None,
    deterministic: bool | None = None,
) -> Any:
    """Make ``optimizer`` distributed, and return it: the same object, of a subclass of its class.

    Learning-rate schedulers, GradScaler and checkpoints take it as before. When ``loss.backward()`` returns, every
    ``grad`` is averaged over the ranks (summed with ``op=Sum``), so that gradients can be clipped or logged at once;
    ``step()`` then does the same on every rank. Gradients are exchanged while backward goes on.

    - ``named_parameters``: ``model.named_parameters()``, for errors that name what is wrong; all parameters or none.
    - ``compression``: what gradients look like while they travel: ``Compression.none``, ``.fp16``, ``.bf16`` (a whole
      bucket at a time), ``.powersgd(rank=4)`` (docs/compression.md), or an object with ``compress`` and ``decompress``,
      which gets each gradient by itself.
    - ``backward_passes_per_step``: exchange after so many backwards, whose gradients are summed as torch accumulates
      them, or averaged over the passes with ``average_aggregated_gradients=True``; a ``step()`` before that many
      exchanges what there is.
    - ``op``: Average, Sum, or Adasum, which takes the optimizer's steps, not the gradients, as what is combined
      (:mod:`mpiddp.optimizer.adasum`).
    - ``gradient_predivide_factor``: an average divides by it before the sum and by the rest of the size after it.
    - ``groups`` (lists of parameters) or ``num_groups`` (so many equal parts): parameters that share a bucket.
    - ``sparse_as_dense``: make sparse gradients dense; otherwise indices and values are gathered.
    - ``process_set``: average among its members; elsewhere the optimizer goes on by itself, as it was.
    - ``shard``: each rank keeps the optimizer's state of one part of the parameters and updates that part, and all
      gather the result (ZeRO-1). After ``backward()`` a gradient lies in parts: ``synchronize()`` makes it whole
      (docs/sharded.md).
    - ``deterministic``: sum in the order of the ranks, 16-bit floats in float32, so that for one number of ranks the
      averages are the same bits at every bucket size, timing and layout of the ranks over nodes; by default what
      ``MPIDDP_DETERMINISTIC`` says. On one node it costs nothing; between nodes the hierarchical exchange is given up,
      so that each node sends what all of its ranks would. Not with lossy compression or Adasum.
    - ``max_grad_norm``: ``step()`` first clips the norm of all gradients to it, by ``optimizer.clip_grad_norm_()``.

    A parameter that got a gradient on some ranks counts as zeros on the others; one that got none anywhere keeps
    None. A second backward before ``step()`` exchanges what it added; with ``op=Sum`` it raises where a gradient
    holds a sum. Start from equal parameters: :func:`broadcast_parameters`.

    Raises ValueError for duplicate, missing or partial names, for LBFGS (with ``shard`` for every optimizer that does
    not treat each element by itself), and for one that is wrapped already; MismatchError, at the first exchange, when
    the ranks' parameters differ in name, shape or dtype.
    """
    here = runtime.current()
    is_ordered = here.config.deterministic if deterministic is None else deterministic
    check_optimizer(optimizer, op, gradient_predivide_factor)
    check_max_norm(max_grad_norm, op)
    check_ordered(is_ordered, op, compression)
    check_powersgd(compression, op, shard)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    names = names_of(optimizer, params, named_parameters)
    if shard:
        check_shardable(optimizer, op)
    if process_set.included() is False:
        become(optimizer, Alone)
        clip_before_steps(optimizer, max_grad_norm)
        return optimizer
    channel = channel_of(process_set)
    if op is Adasum:
        checked_passes(backward_passes_per_step)  # they accumulate over whatever comes before step()
        return wrap_adasum(optimizer, params, here.engine, channel, compression)
    options = Options(
        average=op is Average,
        average_passes=average_aggregated_gradients,
        compression=compression,
        predivide=gradient_predivide_factor,
        groups=groups_by_position(params, num_groups, groups),
        sparse_as_dense=sparse_as_dense,
        first_nbytes=here.config.first_bucket_nbytes,
        bucket_nbytes=here.config.bucket_nbytes,
        nodes=_nodes_to_measure(here, channel.ranks),
        heap_nbytes=here.config.heap_nbytes,
        segment_nbytes=here.config.segment_kb << 10,
        is_ordered=is_ordered,
    )
    wrap = wrap_sharded if shard else _wrap
    return wrap(
        optimizer, here.engine, channel, names, checked_passes(backward_passes_per_step), options, max_grad_norm
    )


def _wrap(
    optimizer: Any,
    engine: Engine,
    channel: Channel,
    names: Sequence[str],
    passes: int,
    options: Options,
    max_norm: float | None,
) -> torch.optim.Optimizer:
    """Make ``optimizer`` average whole gradients."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    become(optimizer, _Distributed)
    optimizer._mpiddp_reducer = Reducer(engine, channel, params, names, passes, options, *ways_of(options))
    optimizer.register_step_pre_hook(_before_step)
    clip_before_steps(optimizer, max_norm)
    optimizer.register_step_post_hook(_after_step)
    return optimizer  # type: ignore[no-any-return]


def _before_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
    """Every gradient must be averaged when the update begins: now, or when the closure has made them."""
    reducer: Reducer = optimizer._mpiddp_reducer
    if optimizer._mpiddp_skip:
        return None
    if closure_of(args, kwargs) is not None:
        return followed_by(reducer.complete, args, kwargs)
    if optimizer._mpiddp_synchronized and reducer.exchanged:
        warnings.warn(
            # Horovod's words, which scripts filter by.
            "optimizer.step() called without optimizer.skip_synchronize() context after optimizer.synchronize(). "
            "Nothing is reduced twice, but say `with optimizer.skip_synchronize(): optimizer.step()`, or leave "
            "synchronize() out: gradients are averaged when backward() returns",
            stacklevel=4,
        )
    reducer.complete()
    check_found(optimizer)
    return None


def _after_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    optimizer._mpiddp_reducer.exchanged = False
    optimizer._mpiddp_synchronized = False


def _nodes_to_measure(here: runtime.Runtime, ranks: Sequence[int]) -> tuple[int, ...]:
    """The nodes of ``ranks``, if they are several and the user has chosen no size of buckets."""
    nodes = tuple(here.world.nodes[rank] for rank in ranks)
    return nodes if here.config.bucket_mb is None and len(set(nodes)) > 1 else ()
