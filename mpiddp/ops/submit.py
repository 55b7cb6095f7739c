"""The one way from a call to the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import ref

import torch

from .. import dtypes, runtime
from ..collectives.base import ReduceOp
from ..engine import Channel, Handle, Key, Kind, Request, Signature, may_meet, meet_at_once
from ..engine import eager as eagerly
from ..errors import ArgumentError, DuplicateNameError
from ..process_set import ProcessSet, global_process_set
from ..uncompiled import uncompiled

__all__ = [
    "channel_of",
    "claim",
    "dense",
    "factor",
    "in_place",
    "named",
    "part_name",
    "part_names",
    "poll",
    "resolved",
    "submit",
    "synchronize",
    "wait_for",
]

#: Names and signatures are looked through, or forgotten, when there are this many.
_REMEMBERED = 4096

_signatures: dict[Any, Signature] = {}


def channel_of(process_set: ProcessSet) -> Channel:
    """The set's channel; raises where this process is no member, or the set was not added."""
    here = runtime.current()
    if process_set is global_process_set:
        return here.channel
    if not isinstance(process_set, ProcessSet):
        raise TypeError(f"process_set is a ProcessSet, not a {type(process_set).__name__}: {process_set!r}")
    if process_set.process_set_id is None:
        raise ArgumentError(f"{process_set!r} has not been added: call mpiddp.add_process_set() on every rank first")
    if process_set.channel is None:
        raise ArgumentError(
            f"rank {here.world.rank} is no member of process set {process_set.process_set_id} (ranks "
            f"{process_set.ranks}); only members may call its collectives"
        )
    return process_set.channel


def dense(value: object, what: str) -> torch.Tensor:
    """``value`` detached, if it is a dense tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{what} takes a torch.Tensor, not a {type(value).__name__}; for objects there is broadcast_object"
        )
    if value.layout is not torch.strided:
        raise ArgumentError(
            f"{what} takes a dense tensor, not one of layout {value.layout}; make it dense with .to_dense(), or use "
            "sparse_allreduce_async"
        )
    return value.detach() if value.requires_grad else value


def named(name: str) -> str:
    """``name`` as a plain str, which is what travels, whatever class of strings it is of."""
    if not isinstance(name, str):
        raise TypeError(f"a name is a str, not a {type(name).__name__}: {name!r}")
    return str.__str__(name)


def part_name(name: str | None, part: object) -> str | None:
    """The name of one of the operations that serve the one called ``name``: None if that has none."""
    return None if name is None else f"{named(name)}.{part}"


def part_names(channel: Channel, name: str | None, *parts: str) -> list[str | None]:
    """:func:`part_name` of each; raises, before anything is sent, if one of them is in flight here."""
    names = [part_name(name, part) for part in parts]
    for each in names:
        if each is not None:
            claim(channel, each)
    return names


def factor(value: Any) -> float:
    """A scale factor as a plain float, which is what travels; numbers of NumPy's and tensors of one element serve."""
    if type(value) is float:
        return value
    if isinstance(value, (str, bytes)):
        raise TypeError(f"a factor is a number, not a {type(value).__name__}: {value!r}")
    return float(value)


def resolved(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, or a copy in whose memory lies what it is: that of a conjugate or negative view is something else."""
    return tensor.resolve_conj().resolve_neg() if tensor.is_conj() or tensor.is_neg() else tensor


def in_place(tensor: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor] | None]:
    """A flat tensor to work on, and how its content becomes that of ``tensor``: nothing to do where it is the same."""
    if tensor.is_inference():
        with torch.inference_mode(False):
            return _in_place(_writable(tensor))
    return _in_place(tensor)


def _in_place(tensor: torch.Tensor) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor] | None]:
    if tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        return tensor if tensor.ndim == 1 else tensor.view(-1), None
    flat = resolved(tensor).contiguous().view(-1)
    return flat, lambda flat: tensor.copy_(flat.view(tensor.shape))


def _writable(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor that may be written outside inference mode, where exchanges are resumed."""
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    if tensor.is_conj():
        alias = alias.conj()
    return torch._neg_view(alias) if tensor.is_neg() else alias


@uncompiled
def submit(
    channel: Channel,
    kind: Kind,
    tensor: torch.Tensor,
    flat: torch.Tensor,
    name: Key | None,
    *,
    deliver: Callable[[Any], Any] | None = None,
    answer: Any = None,
    shape: tuple[int, ...] | None = None,
    op: ReduceOp = ReduceOp.SUM,
    prescale: float = 1.0,
    scale: float = 1.0,
    root: int = 0,
    extent: tuple[int, ...] = (),
    group: tuple[str, int] | tuple[()] = (),
    purpose: str = "",
    blocking: bool = False,
) -> Request:
    """Hand one collective to the engine. ``flat`` is what travels; ``tensor`` is what the caller gave.

    ``name`` is a name, None, or, in a group, what the group has given it. Nothing is scaled or sent, and no number used
    up, where it raises. ``prescale`` and ``scale`` are floats: see :func:`factor`.
    """
    device = tensor.device.type
    is_cuda = device == "cuda"
    if is_cuda:
        channel.link.ways.devices.refuse_capture(tensor)
    described = (
        kind, tensor.dtype, tensor.shape if shape is None else shape, op, root, prescale, scale, device, group, purpose
    )  # fmt: skip
    signature = _signatures.get(described)
    if signature is None:
        signature = _remember(described)
    key: Key
    if name is None:
        channel.unnamed += 1
        key = channel.unnamed
    else:
        key = name if group else named(name)  # type: ignore[arg-type]
        if isinstance(key, str):
            claim(channel, key)
    if prescale != 1.0:
        dtypes.scale_(flat, prescale)
    eager = meets = False
    if blocking and device == "cpu" and op != ReduceOp.ADASUM:
        nbytes, link = flat.nbytes, channel.link
        meets = name is None and kind is Kind.ALLREDUCE and may_meet(link, nbytes)
        eager = kind in eagerly.KINDS and eagerly.worthwhile(nbytes, link.size, link.node is not None)
    request = Request(key, signature, flat, deliver, answer, extent, eager, meets)
    if is_cuda:
        request.passage = channel.link.ways.devices.depart(flat)
    if isinstance(key, str):
        channel.names[key] = ref(request)
    engine = runtime.current().engine
    return meet_at_once(engine, channel, request) if meets else engine.submit(channel, request)


def _remember(described: Any) -> Signature:
    kind, dtype, shape, op, root, prescale, scale, device, group, purpose = described
    if len(_signatures) >= _REMEMBERED:
        _signatures.clear()
    signature = Signature(
        int(kind), dtypes.check(dtype), tuple(shape), int(op), root, prescale, scale, device, tuple(group), purpose
    )
    _signatures[described] = signature
    return signature


def claim(channel: Channel, name: str) -> None:
    """Raise DuplicateNameError if ``name`` is in flight here."""
    found = channel.names.get(name)
    earlier = None if found is None else found()
    if earlier is not None and not earlier.done:
        raise DuplicateNameError(
            f"{name!r} is in flight on rank {channel.ranks[channel.link.rank]} already: synchronize its handle first, "
            "or use another name"
        )
    if len(channel.names) >= _REMEMBERED:
        channel.names = {n: found for n, found in channel.names.items() if (it := found()) is not None and not it.done}


@uncompiled
def wait_for(handle: Handle) -> Any:
    """Push until the handle is done; return its result or raise its error."""
    return runtime.current().engine.wait(handle)


@uncompiled
def poll(handle: Any) -> bool:
    """Whether the result is there; pushes what is in flight first. A finished handle stays finished."""
    if not handle.done:
        runtime.current().engine.push()
    return bool(handle.done)


@uncompiled
def synchronize(handle: Any) -> Any:
    """Wait for an operation; return its result (a list for a group) or raise its error."""
    if isinstance(handle, Handle):
        if handle.done and handle.error is None and handle.passage is None:
            return handle.result
        return runtime.current().engine.wait(handle)
    return handle.collect(synchronize)
