"""Copies of what an elastic state holds, in host memory, and back where they were."""

from __future__ import annotations

import pytest
import torch

from mpiddp.elastic.snapshot import Kept, keep, restored, snapshot


def test_a_restore_undoes_what_was_changed() -> None:
    value = {"losses": [1.0], "weights": torch.ones(2), "pair": (torch.zeros(1), {"n": 3})}
    kept = keep("x", value)
    value["losses"].append(2.0)  # type: ignore[attr-defined]
    value["weights"].fill_(5)  # type: ignore[attr-defined]
    for _ in range(2):
        again = restored("x", kept)
        assert again["losses"] == [1.0] and again["weights"].tolist() == [1, 1] and again["pair"][1] == {"n": 3}
        again["weights"].fill_(7)
        again["losses"].clear()


def test_tensors_of_a_device_come_back_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands in, from which nothing can be copied."""
    own = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *a, **k: torch.zeros(t.shape) if t.is_meta else own(t, *a, **k))
    value = {"best": [torch.empty(2, 3, device="meta")], "mask": torch.ones(2)}
    kept = keep("x", value)
    (inner,) = kept["best"]
    assert isinstance(inner, Kept) and inner.values.device.type == "cpu" and repr(inner) == "Kept((2, 3), of meta)"
    again = restored("x", kept)
    assert again["best"][0].device.type == "meta" and again["best"][0].shape == (2, 3)
    assert again["mask"].device.type == "cpu"
    assert snapshot("x", value)["best"][0].device.type == "cpu", "a state_dict is loaded to wherever it belongs"


def test_what_cannot_be_copied_is_named() -> None:
    with pytest.raises(TypeError, match="the attribute 'loader' of an elastic state cannot be copied"):
        keep("loader", (number for number in range(3)))
