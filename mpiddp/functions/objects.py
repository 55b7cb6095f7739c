"""broadcast_object and allgather_object: any Python object that can be pickled, from one rank or from all.

Objects are pickled by reference where that works, because all ranks run the same script: a class of the script is then
the same class on arrival. What plain pickle refuses (a lambda, a class inside a function) goes by cloudpickle where
that is installed.
"""

from __future__ import annotations

import functools
import importlib
import io
import pickle
from typing import Any

import torch

from .. import runtime
from ..device import local_device
from ..errors import MpiddpError
from ..ops import allgather, broadcast_
from ..ops.submit import channel_of, part_names
from ..process_set import ProcessSet, global_process_set
from .flat import broadcast_bytes, check_root

__all__ = ["allgather_object", "broadcast_object"]


def broadcast_object(
    obj: Any, root_rank: int = 0, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Any:
    """The root's ``obj`` on every rank: itself on the root, a copy on the others, whose own ``obj`` is ignored.

    A CUDA tensor inside travels by way of the CPU, and arrives on the receiver's current CUDA device (on its
    ``local_device()`` where it has not used CUDA yet), or on the CPU where there is none. Two broadcasts: 8 bytes for
    the length, then the bytes.

    Args:
        obj: anything that can be pickled. Only objects of ranks that are trusted: to unpickle is to run code.
        root_rank: the world rank whose object it is.
        name: of the exchange, as in :func:`mpiddp.broadcast`.
        process_set: whose members take part.

    Raises:
        ValueError: ``root_rank`` is no member.
        MpiddpError: on every rank, naming the root: it could not pickle its object.
    """
    channel = channel_of(process_set)
    members = channel.ranks
    check_root(root_rank, members)
    is_root = runtime.rank() == root_rank
    if len(members) == 1:
        return obj
    names = part_names(channel, name, "length", "bytes")
    length, flat, cause = _pickled(obj) if is_root else (0, torch.empty(0, dtype=torch.uint8, device="cpu"), None)
    header = torch.tensor([length], dtype=torch.int64, device="cpu")
    broadcast_(header, root_rank, names[0], process_set)
    length = int(header)
    if not is_root:
        flat = torch.empty(abs(length), dtype=torch.uint8, device="cpu")
    broadcast_bytes(flat, root_rank, names[1], process_set)
    if length < 0:
        raise MpiddpError(f"broadcast_object: rank {root_rank} could not pickle its object: {_text(flat)}") from cause
    return obj if is_root else _unpickled(flat)


def allgather_object(obj: Any, name: str | None = None, process_set: ProcessSet = global_process_set) -> list[Any]:
    """The objects of all members, in the order of the ranks: copies, our own included, so that no rank's list aliases.

    Two all-gathers: 8 bytes a rank for the lengths, then the bytes. As in :func:`broadcast_object`, CUDA tensors travel
    by way of the CPU, and only ranks that are trusted should take part.

    Raises:
        MpiddpError: on every rank, naming the ranks that could not pickle their object.
    """
    channel = channel_of(process_set)
    ranks, names = channel.ranks, part_names(channel, name, "lengths", "bytes")
    length, flat, cause = _pickled(obj)
    header = torch.tensor([length], dtype=torch.int64, device="cpu")
    lengths = allgather(header, names[0], process_set).tolist()
    parts = torch.split(allgather(flat, names[1], process_set), [abs(n) for n in lengths])
    failures = [f"rank {ranks[at]} ({_text(parts[at])})" for at, n in enumerate(lengths) if n < 0]
    if failures:
        raise MpiddpError(f"allgather_object: an object could not be pickled on {', '.join(failures)}") from cause
    return [_unpickled(part) for part in parts]


def _pickled(obj: Any) -> tuple[int, torch.Tensor, Exception | None]:
    """``obj`` as bytes and their number; or the text of an error and minus its length, for the other ranks to raise."""
    try:
        flat, cause = torch.frombuffer(_dump(obj), dtype=torch.uint8), None
        return flat.numel(), flat, cause
    except Exception as error:  # whatever a __reduce__ of the user's may raise
        text = bytearray(f"{type(error).__name__}: {error}".encode())
        return -len(text), torch.frombuffer(text, dtype=torch.uint8), error


def _dump(obj: Any) -> memoryview:
    stream = io.BytesIO()
    try:
        _pickler(pickle.Pickler)(stream, protocol=pickle.HIGHEST_PROTOCOL).dump(obj)
    except Exception:
        try:
            cloudpickle = importlib.import_module("cloudpickle")
        except ImportError:
            cloudpickle = None
        if cloudpickle is None:
            raise
        stream = io.BytesIO()
        _pickler(cloudpickle.Pickler)(stream, protocol=pickle.HIGHEST_PROTOCOL).dump(obj)
    return stream.getbuffer()


def _unpickled(flat: torch.Tensor) -> Any:
    return pickle.loads(flat.numpy().data)


def _text(flat: torch.Tensor) -> str:
    return flat.numpy().tobytes().decode(errors="replace")


@functools.cache
def _pickler(base: Any) -> Any:
    """``base``, a Pickler class, which pickles CUDA tensors as their copies on the CPU."""

    class Pickler(base):  # type: ignore[misc]
        def reducer_override(self, value: Any) -> Any:
            if type(value) in (torch.Tensor, torch.nn.Parameter) and value.is_cuda:
                is_parameter = isinstance(value, torch.nn.Parameter)
                return _cuda_tensor, (value.detach().cpu(), value.requires_grad, is_parameter)
            override = getattr(super(), "reducer_override", None)
            return NotImplemented if override is None else override(value)

    return Pickler


def _cuda_tensor(values: torch.Tensor, requires_grad: bool, is_parameter: bool) -> torch.Tensor:
    # Not the root's device number: the ranks of a node each have a device of their own. Nor the current one, cuda:0 on
    # all ranks, before anything here has chosen it.
    tensor = values
    if torch.cuda.is_available():
        tensor = values.cuda() if torch.cuda.is_initialized() else values.to(local_device())  # type: ignore[no-untyped-call]
    if is_parameter:
        return torch.nn.Parameter(tensor, requires_grad)
    return tensor.requires_grad_(requires_grad)
