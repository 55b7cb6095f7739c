"""SyncBatchNorm: batch normalisation whose statistics are those of all ranks' batches together."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .dtypes import SIXTEEN_BIT
from .errors import ArgumentError
from .ops import Sum, allreduce_
from .ops.submit import channel_of
from .process_set import ProcessSet, global_process_set
from .uncompiled import uncompiled

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(_BatchNorm):
    """``torch.nn.BatchNorm1d/2d/3d`` over the batches of all ranks: in training, forward and backward give what one
    process would get for the ranks' batches joined along dim 0.

    Takes ``(N, C)`` or ``(N, C, ...)`` on any device. N may differ between ranks and be 0 on some; a rank that has
    joined (:func:`mpiddp.join`) counts as an empty batch. Statistics of 16-bit inputs are computed in float32. The
    running statistics become the same bits on all ranks. In evaluation, and in a world of one, nothing is exchanged.

    Cost in training: an all-reduce of ``2 C + 1`` float64 numbers in forward (two for float64 inputs), and one of
    ``2 C`` numbers in backward, where the input needs a gradient. As all ranks have to take part, a layer that some
    ranks skip makes the others wait. The gradients of ``weight`` and ``bias`` are this rank's share, which
    :func:`mpiddp.DistributedOptimizer` averages with all others.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as ``torch.nn.BatchNorm2d`` has them.
        process_set: normalise over its members.

    Raises:
        ValueError: on all ranks: there is but one value a channel in all batches together.
        MismatchError: on all ranks: they disagree about the number of channels or the dtype.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        process_set: ProcessSet = global_process_set,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.process_set = process_set

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_set: ProcessSet = global_process_set) -> nn.Module:
        """``module`` with a SyncBatchNorm in the place of each BatchNorm layer, which takes over its parameters and
        buffers.

        If ``module`` is a BatchNorm layer itself, the new layer is what is returned. To be called before the optimizer
        is made or after: the parameters stay the same objects. Hooks on the old layers are lost.

        Raises ValueError for a lazy layer that has not seen a batch.
        """
        return cls._converted(module, process_set, {})

    @classmethod
    def _converted(cls, module: nn.Module, process_set: ProcessSet, done: dict[nn.Module, nn.Module]) -> nn.Module:
        if module in done:
            return done[module]
        done[module] = converted = cls._in_place_of(module, process_set) if isinstance(module, _BatchNorm) else module
        # Not named_children(), which leaves out the second name of a layer that has two.
        for name, child in module._modules.items():
            if child is not None:
                converted._modules[name] = cls._converted(child, process_set, done)
        return converted

    @classmethod
    def _in_place_of(cls, old: _BatchNorm, process_set: ProcessSet) -> SyncBatchNorm:
        if isinstance(old, nn.modules.lazy.LazyModuleMixin):
            raise ArgumentError(
                f"a {type(old).__name__} has no number of features yet: send a batch through the model, then convert it"
            )
        new = cls(
            old.num_features,
            old.eps,
            old.momentum,
            affine=False,
            track_running_stats=old.track_running_stats,
            process_set=process_set,
        )
        new.affine = old.affine
        new.weight, new.bias = old.weight, old.bias
        new.running_mean, new.running_var = old.running_mean, old.running_var
        new.num_batches_tracked = old.num_batches_tracked
        new.training = old.training
        return new

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm takes an input of at least 2 dims, not of shape {tuple(input.shape)}")
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"this SyncBatchNorm has {self.num_features} features, but dim 1 of the input has {input.shape[1]} "
                f"(its shape is {tuple(input.shape)})"
            )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The normalised input, of its shape and dtype."""
        if not self.training or channel_of(self.process_set).link.size == 1:
            return super().forward(input)
        self._check_input_dim(input)
        return _normalized(self, input)

    def _track(self, mean: torch.Tensor, variance: torch.Tensor, count: torch.Tensor) -> None:
        """Update the running statistics, as BatchNorm does, with the unbiased variance."""
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if self.running_mean is None or self.running_var is None:
            return
        weight: Any = self.momentum
        if weight is None:  # a plain average over all batches
            weight = 1.0 / float(self.num_batches_tracked) if self.num_batches_tracked is not None else 0.0
        unbiased = variance * (count / (count - 1))
        # Nothing is learnt from batches that are all empty.
        for running, value in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.copy_(torch.where(count > 0, torch.lerp(running.to(value.dtype), value, weight), running))

    def extra_repr(self) -> str:
        """As BatchNorm's, with the process set where it is not the world."""
        among = "" if self.process_set is global_process_set else f", process_set={self.process_set!r}"
        return f"{super().extra_repr()}{among}"  # type: ignore[no-untyped-call]


@uncompiled
def _normalized(layer: SyncBatchNorm, input: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        mean, variance, count = _statistics(input.detach(), layer.process_set)
        if layer.track_running_stats:
            layer._track(mean, variance, count)
    output: torch.Tensor = _Normalize.apply(  # type: ignore[no-untyped-call]
        input, layer.weight, layer.bias, mean, variance, count, layer.eps, layer.process_set
    )
    return output


def _dims(tensor: torch.Tensor) -> list[int]:
    """All dims but that of the channels."""
    return [dim for dim in range(tensor.dim()) if dim != 1]


def _along(channels: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """One number a channel, in a shape that broadcasts over ``tensor``."""
    return channels.view(1, -1, *[1] * (tensor.dim() - 2))


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in SIXTEEN_BIT else tensor


def _statistics(input: torch.Tensor, process_set: ProcessSet) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mean and the (biased) variance of each channel over all ranks, and the number of values that went into them.

    Each rank takes its own mean first and its squares about that; these are combined as in Chan, Golub, LeVeque,
    "Updating formulae and a pairwise algorithm for computing sample variances" (1979): ``M2 = sum of M2_r + sum of
    n_r (mean_r - mean)^2``. For inputs of up to 32 bits the second sum is computed in float64 from sums that travel
    with the first one: what cancels there lies far below the input's own precision. For float64 it takes the mean
    first, and so a second all-reduce.
    """
    values = _wide(input)
    here = values.numel() // values.shape[1] if values.shape[1] else 0
    mean = values.sum(_dims(values)) / max(here, 1)
    squares = (values - _along(mean, values)).square_().sum(_dims(values))
    if values.dtype == torch.float64:
        total, count = _summed([mean * here], here, process_set)
        joint = total / count.clamp(min=1)
        m2, _ = _summed([squares + here * (mean - joint).square()], here, process_set)
    else:
        own = mean.double()
        total, moment, count = _summed([own * here, squares.double() + here * own.square()], here, process_set)
        joint = total / count.clamp(min=1)
        m2 = (moment - total * joint).clamp_(min=0)
    # Who has several values a channel knows that all have; so nobody waits for a device in order to see it.
    if here <= 1 and float(count) == 1:
        raise ValueError(
            f"expected more than 1 value per channel over all ranks when training, got input size {tuple(input.shape)} "
            "on this rank and no more on the others"
        )
    variance = m2 / count.clamp(min=1)
    return joint.to(values.dtype), variance.to(values.dtype), count.to(values.dtype)


def _summed(parts: list[torch.Tensor], count: int, process_set: ProcessSet) -> list[torch.Tensor]:
    """Each of ``parts``, and then ``count``, summed over the ranks by one all-reduce."""
    packed = torch.cat([*parts, parts[0].new_full((1,), count)])
    allreduce_(packed, op=Sum, name="SyncBatchNorm.forward", process_set=process_set)
    return list(torch.split(packed, [*[part.numel() for part in parts], 1]))


class _Normalize(torch.autograd.Function):
    """``(x - mean) / sqrt(variance + eps) * weight + bias``, where mean and variance are functions of all ranks' x."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        mean: torch.Tensor,
        variance: torch.Tensor,
        count: torch.Tensor,
        eps: float,
        process_set: ProcessSet,
    ) -> torch.Tensor:
        ctx.save_for_backward(input, weight, mean, (variance + eps).rsqrt(), count)
        ctx.process_set = process_set
        scale, shift = (p if p is None else p.to(mean.dtype) for p in (weight, bias))
        # What is here an evaluation, of given statistics, is one pass over the input on every device.
        return nn.functional.batch_norm(input, mean, variance, scale, shift, training=False, eps=eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight, mean, inverse, count = ctx.saved_tensors
        values, slope = _wide(input), _wide(gradient)
        centred = values - _along(mean, values)
        sums = torch.stack([slope.sum(_dims(slope)), (slope * centred).sum(_dims(slope))])
        bias_grad, weight_grad = sums[0].clone(), sums[1] * inverse
        input_grad = None
        if ctx.needs_input_grad[0]:
            allreduce_(sums, op=Sum, name="SyncBatchNorm.backward", process_set=ctx.process_set)
            of_mean, of_variance = sums / count.clamp(min=1)
            scale = inverse if weight is None else inverse * weight.to(inverse.dtype)
            # scale * (slope - of_mean - centred * inverse^2 * of_variance), with few passes over the input.
            input_grad = centred.mul_(_along(-scale * inverse.square() * of_variance, values))
            input_grad.sub_(_along(scale * of_mean, values)).addcmul_(slope, _along(scale, values))
            input_grad = input_grad.to(input.dtype)
        return (
            input_grad,
            weight_grad.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            bias_grad.to(weight.dtype) if ctx.needs_input_grad[2] else None,
            *[None] * 5,
        )
