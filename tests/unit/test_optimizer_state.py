"""Where the tensors of an optimizer land, in one process: the meta device stands for a GPU, ours or the root's."""

from __future__ import annotations

import pytest
import torch

from mpiddp.functions.optimizer_state import _Outline, _prepare, _problem, _Room, _Snapshot


def adam(device: str, with_state: bool, **options: bool) -> tuple[torch.optim.Optimizer, torch.Tensor]:
    weight = torch.nn.Parameter(torch.zeros(3, 2, device=device))
    optimizer = torch.optim.Adam([weight], **options)
    if with_state:
        step_device = device if options.get("capturable") or options.get("fused") else "cpu"
        optimizer.state[weight] = {
            "step": torch.tensor(4.0, device=step_device),
            "exp_avg": torch.zeros(3, 2, device=device),
            "exp_avg_sq": torch.zeros(3, 2, device=device),
        }
    return optimizer, weight


def landed(roots: torch.optim.Optimizer, ours: torch.optim.Optimizer) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The tensors that travel, and the room that we make for them; everything is installed."""
    cargo: dict[int, tuple[int, torch.Tensor]] = {}
    snapshot = _Snapshot.of(roots, _Outline.of(roots), cargo)
    room = _Room()
    _prepare(ours, snapshot, room)()
    return [tensor for _, tensor in cargo.values()], room.tensors()


@pytest.mark.parametrize("root_device", ["cpu", "meta"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=["plain", "capturable"])
def test_moments_land_beside_their_parameter_and_step_where_adam_wants_it(root_device, device, options):
    roots, _ = adam(root_device, with_state=True, **options)
    ours, weight = adam(device, with_state=False, **options)
    sent, received = landed(roots, ours)
    assert [(t.shape, t.dtype) for t in sent] == [(t.shape, t.dtype) for t in received]
    state = ours.state[weight]
    assert state["exp_avg"].device.type == state["exp_avg_sq"].device.type == device
    assert state["step"].device.type == (device if options else "cpu")


def test_tensors_that_fit_are_filled_and_others_replaced():
    roots, _ = adam("cpu", with_state=True)
    ours, weight = adam("cpu", with_state=True)
    kept = ours.state[weight]["exp_avg"]
    ours.state[weight]["exp_avg_sq"] = replaced = torch.zeros(3, 2, dtype=torch.float64)
    landed(roots, ours)
    assert ours.state[weight]["exp_avg"] is kept
    assert ours.state[weight]["exp_avg_sq"] is not replaced
    assert ours.state[weight]["exp_avg_sq"].dtype is torch.float32


def test_a_tensor_that_groups_share_travels_once_and_one_that_they_do_not_lands_apart():
    def two_groups(*rates: torch.Tensor) -> torch.optim.Optimizer:
        weights = [torch.nn.Parameter(torch.zeros(2)) for _ in rates]
        return torch.optim.SGD([{"params": [w], "lr": r} for w, r in zip(weights, rates, strict=True)], lr=1.0)

    shared = torch.tensor(0.1)
    apart = [torch.tensor(0.1), torch.tensor(0.2)]
    sent, received = landed(two_groups(shared, shared), two_groups(*apart))
    assert len(sent) == len(received) == 1
    ours = two_groups(shared, shared)
    sent, received = landed(two_groups(*apart), ours)
    assert len(sent) == len(received) == 2
    assert ours.param_groups[0]["lr"] is not ours.param_groups[1]["lr"]


def test_parameters_are_called_by_their_names_where_the_optimizer_knows_them():
    def outline(shape: tuple[int, ...]) -> _Outline:
        return _Outline("Adam", [[shape]], [["head.weight"]], in_pieces=False)

    assert _problem(outline((2,)), outline((2,)), 0) is None
    assert _problem(outline((2,)), outline((3,)), 1) == "head.weight of group 0 has shape (2,) here and (3,) on rank 1"
