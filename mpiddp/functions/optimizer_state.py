"""broadcast_optimizer_state: every rank starts with the root's momenta, step counts and hyperparameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from .. import runtime
from .flat import broadcast_tensors, check_root
from .objects import broadcast_object
from .problems import raise_together

__all__ = ["broadcast_optimizer_state"]

# The root's tensors with their numbers, by id: one that several groups share (a learning rate) travels once.
_Cargo = dict[int, tuple[int, torch.Tensor]]


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, root_rank: int = 0, model: Any = None) -> None:
    """Give every rank the root's optimizer state and the hyperparameters of its groups; nothing changes on the root.

    No step is taken: where the root has no state yet (a fresh optimizer), no rank has any afterwards; where only the
    root has (it loaded a checkpoint), the others get theirs. Values keep their Python types. A tensor arrives where the
    receiving rank's optimizer wants it: beside its parameter, or on the CPU (the ``step`` of Adam, unless capturable or
    fused). Parameters are matched by their position in their group.

    Args:
        optimizer: any of torch.optim but LBFGS, or one made by ``DistributedOptimizer``.
        root_rank: the rank whose state all others take.
        model: accepted for scripts that pass it; of use only where a step must be taken to make the state.

    Raises:
        ValueError: the optimizer is an LBFGS, or ``root_rank`` is no rank of the world.
        MismatchError: on every rank: the optimizers differ in class, groups or parameters. Nothing was changed then.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("the state of torch.optim.LBFGS cannot be broadcast; take an optimizer that keeps no history")
    check_root(root_rank)
    if runtime.size() == 1:
        return
    is_root = runtime.rank() == root_rank
    ours = _Outline.of(optimizer)
    tensors: _Cargo = {}
    snapshot = _Snapshot.of(optimizer, ours, tensors) if is_root else None
    snapshot = broadcast_object(snapshot, root_rank, "broadcast_optimizer_state.outline")
    raise_together("broadcast_optimizer_state", _problem(ours, snapshot.outline, root_rank))
    if is_root:
        broadcast_tensors([tensor for _, tensor in tensors.values()], root_rank, "broadcast_optimizer_state")
        return
    room = _Room()
    install = _prepare(optimizer, snapshot, room)
    broadcast_tensors(room.tensors(), root_rank, "broadcast_optimizer_state")
    install()


@dataclasses.dataclass(frozen=True)
class _Outline:
    """What must be the same on all ranks: the class of the optimizer, and the shapes of each group's parameters."""

    kind: str
    shapes: list[list[tuple[int, ...]]]
    names: list[list[str]]
    in_pieces: bool  # with shard=True, each rank has a part of the state, and nothing of it travels

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> _Outline:
        groups = optimizer.param_groups
        shapes = [[tuple(param.shape) for param in group["params"]] for group in groups]
        positions = [[f"parameter {number}" for number in range(len(group["params"]))] for group in groups]
        names = [group.get("param_names", default) for group, default in zip(groups, positions, strict=True)]
        in_pieces = getattr(optimizer, "_mpiddp_is_in_pieces", bool)()
        return cls(type(optimizer).__name__, shapes, names, in_pieces)


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Stands for a tensor in a snapshot: the ``index``-th of those that travel beside it."""

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    on_cpu: bool


@dataclasses.dataclass(frozen=True)
class _Snapshot:
    """An optimizer without its tensors. ``state`` is keyed by (group, position), or by a key of the optimizer's own."""

    outline: _Outline
    options: list[dict[str, Any]]
    state: list[tuple[Any, Any]]
    powersgd: Any  # what that compression remembers alike on all ranks; None with another

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, outline: _Outline, tensors: _Cargo) -> _Snapshot:
        """Take a snapshot; the tensors that its slots stand for go to ``tensors``."""
        places = {id(param): place for place, param in _places(optimizer)}
        options = [
            {name: _lift(value, group["params"][:1], tensors) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        state = [
            (places[id(key)], _lift(values, [key], tensors)) if id(key) in places else (key, _lift(values, [], tensors))
            for key, values in optimizer.state.items()
        ]
        memory = _memory(optimizer)
        return cls(outline, options, state, None if memory is None else memory.common())


class _Room:
    """The receiver's tensors: one for each index that a slot names."""

    def __init__(self) -> None:
        self._of_index: dict[int, torch.Tensor] = {}
        self._taken: set[int] = set()

    def take(self, slot: _Slot, present: Any, device: torch.device) -> torch.Tensor:
        """A tensor for ``slot``: the one that is ``present`` if it fits, so that who holds it sees the new values."""
        if slot.index not in self._of_index:
            fits = (
                isinstance(present, torch.Tensor)
                and (tuple(present.shape), present.dtype, present.device) == (slot.shape, slot.dtype, device)
                and id(present) not in self._taken
            )
            tensor = present if fits else torch.empty(slot.shape, dtype=slot.dtype, device=device)
            self._taken.add(id(tensor))
            self._of_index[slot.index] = tensor
        return self._of_index[slot.index]

    def tensors(self) -> list[torch.Tensor]:
        """All of them, in the order in which the root lists its own."""
        return [self._of_index[index] for index in range(len(self._of_index))]


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a parameter stands: the ``position``-th of its group."""

    group: int
    position: int


def _places(optimizer: torch.optim.Optimizer) -> list[tuple[_Place, torch.Tensor]]:
    groups = enumerate(optimizer.param_groups)
    return [(_Place(number, position), p) for number, group in groups for position, p in enumerate(group["params"])]


def _lift(value: Any, params: list[torch.Tensor], tensors: _Cargo) -> Any:
    """``value`` with a slot in the place of each tensor, which goes to ``tensors``; ``params``: those it belongs to."""
    if isinstance(value, torch.Tensor):
        index, _ = tensors.setdefault(id(value), (len(tensors), value))
        beside = any(value.device == p.device and (p.device.type != "cpu" or value.dim() == p.dim()) for p in params)
        return _Slot(index, tuple(value.shape), value.dtype, value.device.type == "cpu" and not beside)
    if type(value) in (list, tuple):
        return type(value)(_lift(item, params, tensors) for item in value)
    if type(value) is dict:
        return {key: _lift(item, params, tensors) for key, item in value.items()}
    return value


def _prepare(optimizer: torch.optim.Optimizer, snapshot: _Snapshot, room: _Room) -> Callable[[], None]:
    """Make room for the tensors of ``snapshot``; what is returned puts everything in its place when they are there."""
    groups = optimizer.param_groups
    options = [
        _land(named, group, _devices(named, group["params"]), room)
        for group, named in zip(groups, snapshot.options, strict=True)
    ]
    state: dict[Any, Any] = {}
    for place, values in snapshot.state:
        if isinstance(place, _Place):
            key = groups[place.group]["params"][place.position]
            devices = _devices(snapshot.options[place.group], [key])
        else:
            key, devices = place, _devices({}, [])
        state[key] = _land(values, optimizer.state.get(key), devices, room)

    def install() -> None:
        for group, named in zip(groups, options, strict=True):
            group.update(named)
        optimizer.state.clear()
        optimizer.state.update(state)
        memory = _memory(optimizer)
        if memory is not None and snapshot.powersgd is not None:
            memory.take(snapshot.powersgd)
        if hasattr(optimizer, "_mpiddp_forget_parts") and not snapshot.outline.in_pieces:
            optimizer._mpiddp_forget_parts()

    return install


def _memory(optimizer: torch.optim.Optimizer) -> Any:
    return getattr(optimizer, "_mpiddp_memory", lambda: None)()


def _devices(options: dict[str, Any], params: list[torch.Tensor]) -> tuple[torch.device, torch.device]:
    """Where a tensor goes that was beside the root's parameter, and one that was on the root's CPU."""
    cpu = torch.device("cpu")
    beside = params[0].device if params else cpu
    return beside, beside if options.get("capturable") or options.get("fused") else cpu


def _land(value: Any, present: Any, devices: tuple[torch.device, torch.device], room: _Room) -> Any:
    """``value`` with a tensor in the place of each slot; ``present``: what stands there now."""
    if isinstance(value, _Slot):
        return room.take(value, present, devices[value.on_cpu])
    if type(value) in (list, tuple):
        presents = present if type(present) is type(value) and len(present) == len(value) else [None] * len(value)
        return type(value)(_land(item, old, devices, room) for item, old in zip(value, presents, strict=True))
    if type(value) is dict:
        presents = present if type(present) is dict else {}
        return {key: _land(item, presents.get(key), devices, room) for key, item in value.items()}
    return value


def _problem(ours: _Outline, roots: _Outline, root_rank: int) -> str | None:
    """The first way in which our optimizer differs from the root's, in words; None if it does not."""
    if ours.kind != roots.kind:
        return f"the optimizer is a {ours.kind} here and a {roots.kind} on rank {root_rank}"
    if len(ours.shapes) != len(roots.shapes):
        return f"{len(ours.shapes)} parameter groups here and {len(roots.shapes)} on rank {root_rank}"
    for number, (mine, theirs) in enumerate(zip(ours.shapes, roots.shapes, strict=True)):
        if len(mine) != len(theirs):
            return f"{len(mine)} parameters in group {number} here and {len(theirs)} on rank {root_rank}"
        for name, shape, root_shape in zip(ours.names[number], mine, theirs, strict=True):
            if shape != root_shape:
                return f"{name} of group {number} has shape {shape} here and {root_shape} on rank {root_rank}"
    if roots.in_pieces and not ours.in_pieces:
        return f"a state was loaded here, and rank {root_rank} has a part of another (shard=True): load it there, too"
    return None
