"""``DistributedOptimizer``: the user's own optimizer, whose gradients are averaged over the ranks when backward
returns."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .. import runtime
from ..collectives.base import cut
from ..compression import Compression, is_lossy
from ..op import Adasum, Average, Op, Sum
from ..ops.submit import channel_of
from ..process_set import ProcessSet, global_process_set
from .adasum import wrap_adasum
from .clipping import check_max_norm, clip_before_steps
from .options import Options
from .powersgd import check_powersgd, ways_of
from .reducer import Reducer
from .sharded import check_shardable, wrap_sharded
from .wrapped import Alone, Wrapped, become

__all__ = ["DistributedOptimizer"]


class _Distributed(Wrapped):
    """What a wrapped optimizer can do beyond its own class. Mixed into a subclass of that class."""

    _mpiddp_reducer: Reducer
    _mpiddp_synchronized = False
    _mpiddp_skip = False

    def synchronize(self) -> None:
        """Have every gradient averaged now. Needed only in scripts that say so; backward has done it as a rule."""
        if not self._mpiddp_reducer.exchanged or self._mpiddp_reducer.in_flight:
            self._mpiddp_reducer.finish()
        self._mpiddp_synchronized = True

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """torch.nn.utils.clip_grad_norm_ of the averaged gradients: the same on every rank."""
        if not self._mpiddp_reducer.exchanged or self._mpiddp_reducer.in_flight:
            self._mpiddp_reducer.finish()
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
        self._mpiddp_reducer.passes = _passes(passes)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """As the wrapped class's; raises while gradients are being exchanged."""
        if self._mpiddp_reducer.in_flight:
            raise RuntimeError(
                "zero_grad() was called while gradients are being exchanged, since a backward was begun and did "
                "not end; call optimizer.synchronize() first"
            )
        super().zero_grad(*args, **kwargs)  # type: ignore[misc]
        self._mpiddp_reducer.forget_passes()

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
    None. A second backward before ``step()`` exchanges what it added; with ``op=Sum`` it raises. Start from equal
    parameters: :func:`broadcast_parameters`.

    Raises ValueError for duplicate, missing or partial names, for LBFGS (with ``shard`` for every optimizer that does
    not treat each element by itself), and for one that is wrapped already; MismatchError, at the first exchange, when
    the ranks' parameters differ in name, shape or dtype.
    """
    here = runtime.current()
    _check(optimizer, op, gradient_predivide_factor)
    check_max_norm(max_grad_norm, op)
    is_ordered = here.config.deterministic if deterministic is None else deterministic
    _check_ordered(is_ordered, op, compression)
    check_powersgd(compression, op, shard)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    names = _names(optimizer, params, named_parameters)
    if shard:
        check_shardable(optimizer, op)
    if process_set.included() is False:
        become(optimizer, Alone)
        clip_before_steps(optimizer, max_grad_norm)
        return optimizer
    channel = channel_of(process_set)
    if op is Adasum:
        _passes(backward_passes_per_step)  # they accumulate over whatever comes before step(); checked all the same
        return wrap_adasum(optimizer, params, here.engine, channel, compression)
    options = Options(
        average=op is Average,
        average_passes=average_aggregated_gradients,
        compression=compression,
        predivide=gradient_predivide_factor,
        groups=_groups(params, num_groups, groups),
        sparse_as_dense=sparse_as_dense,
        first_nbytes=here.config.first_bucket_nbytes,
        bucket_nbytes=here.config.bucket_nbytes,
        nodes=_nodes_to_measure(here, channel.ranks),
        heap_nbytes=here.config.heap_nbytes,
        segment_nbytes=here.config.segment_kb << 10,
        is_ordered=is_ordered,
    )
    if shard:
        return wrap_sharded(
            optimizer, here.engine, channel, names, _passes(backward_passes_per_step), options, max_grad_norm
        )
    become(optimizer, _Distributed)
    optimizer._mpiddp_reducer = Reducer(  # type: ignore[attr-defined]
        here.engine, channel, params, names, _passes(backward_passes_per_step), options, *ways_of(options)
    )
    optimizer.register_step_pre_hook(_before_step)
    clip_before_steps(optimizer, max_grad_norm)
    optimizer.register_step_post_hook(_after_step)
    return optimizer


def _before_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Every gradient must be averaged when the update begins; a closure sees to that itself, by its backward."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is not None or optimizer._mpiddp_skip:
        return
    if optimizer._mpiddp_synchronized:
        warnings.warn(
            "optimizer.step() was called after optimizer.synchronize(); nothing is reduced twice, but say "
            "`with optimizer.skip_synchronize(): optimizer.step()`, or leave synchronize() out: gradients are "
            "averaged when "
            "backward() returns",
            stacklevel=4,
        )
        return
    if not optimizer._mpiddp_reducer.exchanged or optimizer._mpiddp_reducer.in_flight:
        optimizer._mpiddp_reducer.finish()


def _after_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    optimizer._mpiddp_reducer.exchanged = False
    optimizer._mpiddp_synchronized = False


def _check(optimizer: torch.optim.Optimizer, op: Op, predivide: float) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"DistributedOptimizer takes a torch.optim.Optimizer, not a {type(optimizer).__name__}")
    if isinstance(optimizer, Wrapped):
        raise ValueError("this optimizer is distributed already: wrap it once")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS cannot be distributed: it evaluates the loss several times a step and decides from local values how "
            "often, so the ranks would drift apart; use a first-order optimizer"
        )
    if op not in (Average, Sum, Adasum):
        raise ValueError(f"gradients are averaged or summed, so op is Average, Sum or Adasum, not {op!r}")
    if not predivide > 0:
        raise ValueError(f"gradient_predivide_factor must be positive, not {predivide!r}")
    if predivide != 1.0 and op is not Average:
        raise ValueError(f"gradient_predivide_factor={predivide} splits the division of an Average; op is {op!r}")


def _check_ordered(is_ordered: bool, op: Op, compression: Any) -> None:
    if is_ordered and (op is Adasum or is_lossy(compression)):
        what = "op=Adasum" if op is Adasum else f"lossy compression ({getattr(compression, '__name__', compression)})"
        raise ValueError(
            f"deterministic=True (or MPIDDP_DETERMINISTIC=1) does not go with {what}: leave one of them out"
        )


def _groups(
    params: Sequence[torch.Tensor], num_groups: int, groups: int | Sequence[Sequence[torch.Tensor]] | None
) -> dict[int, int]:
    """The number of the group of each parameter that is in one, by its position."""
    if isinstance(groups, int) and not isinstance(groups, bool):
        num_groups, groups = groups, None
    if groups is None:
        if isinstance(num_groups, bool) or not isinstance(num_groups, int) or num_groups < 0:
            raise ValueError(f"num_groups is a whole number of at least 0, not {num_groups!r}")
        parts = cut(0, len(params), num_groups) if num_groups else []
        return {index: number for number, (lo, hi) in enumerate(parts) for index in range(lo, hi)}
    if not isinstance(groups, (list, tuple)) or any(not isinstance(group, (list, tuple)) for group in groups):
        raise ValueError("groups must be a number, or a list of lists of parameters")
    position = {id(param): index for index, param in enumerate(params)}
    found: dict[int, int] = {}
    for number, group in enumerate(groups):
        for param in group:
            index = position.get(id(param))
            if index is None:
                raise ValueError(f"groups[{number}] has a tensor that is no parameter of the optimizer")
            if index in found:
                raise ValueError(f"a parameter is in groups {found[index]} and {number}; groups must not overlap")
            found[index] = number
    return found


def _nodes_to_measure(here: runtime.Runtime, ranks: Sequence[int]) -> tuple[int, ...]:
    """The nodes of ``ranks``, if they are several and the user has chosen no size of buckets."""
    nodes = tuple(here.world.nodes[rank] for rank in ranks)
    return nodes if here.config.bucket_mb is None and len(set(nodes)) > 1 else ()


def _passes(passes: int) -> int:
    if isinstance(passes, bool) or not isinstance(passes, int) or passes < 1:
        raise ValueError(f"backward_passes_per_step is a whole number of at least 1, not {passes!r}")
    return passes


def _names(
    optimizer: torch.optim.Optimizer,
    params: list[torch.Tensor],
    named_parameters: Iterable[tuple[str, torch.Tensor]] | None,
) -> list[str]:
    """A name for each parameter: the given ones, or its group and place."""
    if named_parameters is None:
        return [
            f"group{number}.{at}"
            for number, group in enumerate(optimizer.param_groups)
            for at in range(len(group["params"]))
        ]
    pairs = list(named_parameters)
    if any(not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)) for pair in pairs):
        raise ValueError(
            "named_parameters must be pairs of a name and a parameter, as model.named_parameters() gives them"
        )
    seen: set[str] = set()
    duplicates = sorted({name for name, _ in pairs if name in seen or seen.add(name)})  # type: ignore[func-returns-value]
    if duplicates:
        raise ValueError(f"named_parameters has names more than once: {', '.join(duplicates)}; names must be unique")
    name_of = {id(param): name for name, param in pairs}
    unnamed = [at for at, param in enumerate(params) if id(param) not in name_of]
    if unnamed:
        raise ValueError(
            f"named_parameters names {len(params) - len(unnamed)} of the optimizer's {len(params)} parameters; "
            f"those at positions {unnamed[:10]} have no name. Pass the named_parameters() of every model that it "
            "optimizes, or none"
        )
    return [name_of[id(param)] for param in params]
