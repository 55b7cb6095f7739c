"""Start equal: broadcast_parameters, broadcast_optimizer_state, and the two for objects."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from mpiddp.functions import flat

pytestmark = pytest.mark.ranks(1, 2, 3)

OPTIMIZERS = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("Adam", {"lr": 0.1}),
    ("Adam", {"lr": 0.1, "amsgrad": True, "foreach": True}),
    ("AdamW", {"lr": 0.1, "fused": True}),
    ("AdamW", {"lr": torch.tensor(0.1)}),
    ("NAdam", {}),
    ("RAdam", {}),
    ("Adamax", {}),
    ("Adadelta", {}),
    ("Adagrad", {}),
    ("Adafactor", {}),
    ("ASGD", {}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
    ("Rprop", {}),
]


class Odd(nn.Module):
    """Parameters and buffers of every kind; the values depend on ``seed``."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(5, 3, generator=generator).t())  # not contiguous
        self.scalar = nn.Parameter(torch.randn((), generator=generator))
        self.narrow = nn.Parameter(torch.randn(7, generator=generator).to(torch.bfloat16))
        self.frozen = nn.Parameter(torch.randn(2, 2, generator=generator), requires_grad=False)
        self.tied = self.weight
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.norm = nn.BatchNorm1d(3)
        self.norm.num_batches_tracked.fill_(seed + 5)
        image = torch.randn(1, 2, 3, 4, generator=generator).to(memory_format=torch.channels_last)
        self.register_buffer("image", image)
        self.register_buffer("mask", torch.rand(9, generator=generator) < 0.5)
        self.register_buffer("waves", torch.randn(3, dtype=torch.complex64, generator=generator).conj())
        self.register_buffer("wide", torch.randn(3, dtype=torch.float64, generator=generator))
        self.register_buffer("none", None)


def check_equal(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert list(ours) == list(wanted)
    for name, tensor in ours.items():
        assert tensor.dtype == wanted[name].dtype
        assert torch.equal(tensor.resolve_conj(), wanted[name].resolve_conj()), name


def fresh(seed: int, kind: str = "AdamW", steps: int = 0, **options: object):
    """A model of three parameters, and its optimizer after some steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1, bias=False))
    optimizer = getattr(torch.optim, kind)(model.parameters(), **copy.deepcopy(options))
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
    return model, optimizer


# --- broadcast_parameters


@pytest.mark.parametrize("root", [0, -1])
def test_a_state_dict_with_everything(world, root):
    root %= world.size()
    model = Odd(world.rank())
    addresses = {name: t.data_ptr() for name, t in model.state_dict().items()}
    world.broadcast_parameters(model.state_dict(), root_rank=root)
    check_equal(model.state_dict(), Odd(root).state_dict())
    assert {name: t.data_ptr() for name, t in model.state_dict().items()} == addresses
    assert model.tied is model.weight
    assert model.weight.requires_grad
    assert not model.frozen.requires_grad
    assert not model.weight.is_contiguous()
    model.weight.sum().backward()  # still a leaf with a usable history
    assert model.weight.grad is not None


@pytest.mark.parametrize("form", [list, iter, dict, tuple])
def test_named_parameters_in_any_form_leave_the_buffers(world, form):
    model = Odd(world.rank())
    world.broadcast_parameters(form(model.named_parameters()), 0)
    check_equal(dict(model.named_parameters()), dict(Odd(0).named_parameters()))
    assert model.norm.num_batches_tracked == world.rank() + 5


def test_tensors_without_names_meet_by_position(world):
    tensors = [torch.full((2,), float(world.rank())), torch.full((3,), float(world.rank()))]
    world.broadcast_parameters(tensors, world.size() - 1)
    assert all(torch.equal(t, torch.full_like(t, world.size() - 1.0)) for t in tensors)


def test_names_may_come_in_different_orders(world):
    named = [(f"p{i}", torch.full((i,), 10.0 * world.rank() + i)) for i in range(1, 6)]
    world.broadcast_parameters(named[:: -1 if world.rank() % 2 else 1], 0)
    for i, (_, tensor) in enumerate(named, 1):
        assert torch.equal(tensor, torch.full((i,), float(i)))


def test_thousands_of_small_tensors_take_a_handful_of_broadcasts(world, monkeypatch):
    started = []
    submit = flat.broadcast_async_
    monkeypatch.setattr(flat, "broadcast_async_", lambda *a: started.append(a[2]) or submit(*a))
    named = [(f"p{i}", torch.full((3,), float(i + world.rank()))) for i in range(3000)]
    world.broadcast_parameters(named, 0)
    assert all(torch.equal(tensor, torch.full((3,), float(i))) for i, (_, tensor) in enumerate(named))
    assert len(started) == (2 if world.size() > 1 else 0)  # the table of names, and one window of tensors


def test_windows_and_pieces(world, monkeypatch):
    """Small limits, so that tensors fill several windows and several pieces of one."""
    monkeypatch.setattr(flat, "WINDOW_NBYTES", 64)
    monkeypatch.setattr(flat, "PIECE_NBYTES", 96)
    rank = float(world.rank())
    named = [(f"p{i}", torch.arange(n, dtype=torch.float32) + rank) for i, n in enumerate([1, 100, 3, 0, 9, 7, 50])]
    named.append(("turned", (torch.arange(60, dtype=torch.float64) + rank).view(6, 10).t()))
    world.broadcast_parameters(named, 0)
    for _, tensor in named[:-1]:
        assert torch.equal(tensor, torch.arange(tensor.numel(), dtype=torch.float32))
    assert torch.equal(named[-1][1], torch.arange(60, dtype=torch.float64).view(6, 10).t())


@pytest.mark.parametrize(
    "params",
    [nn.Linear(1, 1), torch.zeros(2), 3, "weight", {"param_groups": []}, [("a", 1)], [("a", torch.zeros(1), 2)]],
    ids=["module", "tensor", "int", "str", "optimizer state", "no tensor", "triple"],
)
def test_anything_else_is_a_value_error(world, params):
    with pytest.raises(ValueError, match="state_dict"):
        world.broadcast_parameters(params, 0)


def test_a_name_twice_and_a_root_that_is_none(world):
    with pytest.raises(ValueError, match="'a' occurs twice"):
        world.broadcast_parameters([("a", torch.zeros(1)), ("a", torch.zeros(1))], 0)
    with pytest.raises(ValueError, match=f"between 0 and {world.size() - 1}, not {world.size()}"):
        world.broadcast_parameters([], world.size())


def test_extra_state_of_a_module_is_left_out(world):
    weight = torch.full((2,), float(world.rank()))
    state = {"weight": weight, "_extra_state": {"version": 3}, "block._extra_state": None}
    world.broadcast_parameters(state, 0)
    assert torch.equal(weight, torch.zeros(2))


@pytest.mark.parametrize(
    ("odd_one", "words"),
    [
        ({"a": torch.ones(2), "b": torch.ones(4)}, r"b is float32 of shape \(4,\) here and float32 of shape \(3,\) on"),
        ({"a": torch.ones(2), "b": torch.ones(3).half()}, r"b is float16 of shape \(3,\) here and float32"),
        ({"a": torch.ones(2)}, "b is missing here and present on rank 0"),
        ({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, "c is present here and missing on rank 0"),
        ({"a": torch.ones(2), "b": torch.ones(3).to_sparse()}, "b has the layout torch.sparse_coo"),
        ({"a": torch.ones(2), "b": torch.ones(3, device="meta")}, "b is on the meta device"),
        ({"a": torch.ones(2), "b": nn.LazyLinear(2).weight}, "b has no shape yet"),
    ],
    ids=["shape", "dtype", "missing", "more", "sparse", "meta", "lazy"],
)
def test_a_mismatch_is_named_on_every_rank_and_changes_nothing(world, odd_one, words):
    if world.size() == 1:
        pytest.skip("nobody to differ from")
    last = world.size() - 1
    params = odd_one if world.rank() == last else {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(world.MismatchError, match=f"broadcast_parameters: rank {last}: {words}"):
        world.broadcast_parameters(params, 0)
    assert torch.equal(params["a"], torch.full((2,), float(world.rank() == last)))
    assert world.allgather_object(world.rank()) == list(range(world.size()))  # and the library is usable


# --- broadcast_optimizer_state


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS, ids=lambda v: v if isinstance(v, str) else ",".join(v))
def test_state_that_only_the_root_has(world, kind, options):
    _, optimizer = fresh(world.rank(), kind, 2 if world.rank() == 0 else 0, **options)
    _, expected = fresh(0, kind, 2, **options)
    world.broadcast_optimizer_state(optimizer, root_rank=0)
    assert_same_state(optimizer, expected)


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS, ids=lambda v: v if isinstance(v, str) else ",".join(v))
def test_the_next_step_is_the_roots(world, kind, options):
    model, optimizer = fresh(world.rank(), kind, 2 + world.rank(), **options)
    world.broadcast_parameters(model.state_dict(), 0)
    world.broadcast_optimizer_state(optimizer, 0)
    torch.manual_seed(99)
    optimizer.zero_grad()
    model(torch.randn(8, 3)).square().mean().backward()
    optimizer.step()
    everyone = world.allgather_object(model.state_dict())
    for other in everyone:
        check_equal(other, everyone[0])


def assert_same_state(ours: torch.optim.Optimizer, wanted: torch.optim.Optimizer) -> None:
    mine, theirs = ours.state_dict(), wanted.state_dict()
    assert repr(mine["param_groups"]) == repr(theirs["param_groups"])
    assert mine["state"].keys() == theirs["state"].keys()
    for key, values in theirs["state"].items():
        assert mine["state"][key].keys() == values.keys()
        for name, value in values.items():
            got = mine["state"][key][name]
            assert type(got) is type(value), name
            if isinstance(value, torch.Tensor):
                assert (got.dtype, got.device, got.shape) == (value.dtype, value.device, value.shape)
                assert torch.equal(got, value), name
            else:
                assert got == value, name


def test_nobody_has_state_and_nobody_gets_any(world):
    model, optimizer = fresh(world.rank(), "AdamW", lr=0.1, weight_decay=0.5)
    before = copy.deepcopy(model.state_dict())
    world.broadcast_optimizer_state(optimizer, 0)
    assert not optimizer.state
    assert all(parameter.grad is None for parameter in model.parameters())
    check_equal(model.state_dict(), before)


def test_state_that_the_root_has_not_is_dropped(world):
    _, optimizer = fresh(world.rank(), "Adam", steps=world.rank())
    world.broadcast_optimizer_state(optimizer, 0)
    assert not optimizer.state


def test_the_root_is_left_as_it_is(world):
    model, optimizer = fresh(0, "Adam", 2)
    first = next(model.parameters())
    tensors = {name: (id(t), t.clone()) for name, t in optimizer.state[first].items()}
    world.broadcast_optimizer_state(optimizer, 0)
    for name, (identity, values) in tensors.items():
        assert id(optimizer.state[first][name]) == identity
        assert torch.equal(optimizer.state[first][name], values)


def test_hyperparameters_keep_their_types(world):
    root = world.rank() == 0
    _, optimizer = fresh(0, "AdamW", lr=1e-3 if root else 0.5, betas=(0.8, 0.9) if root else (0.1, 0.2))
    group = optimizer.param_groups[0]
    group["note"] = {"a": [1, 2.5, None], "b": ("x", True)} if root else None
    if not root:
        group["initial_lr"] = 0.5
    world.broadcast_optimizer_state(optimizer, 0)
    assert (group["lr"], group["betas"], group["foreach"], group["maximize"]) == (1e-3, (0.8, 0.9), None, False)
    assert type(group["lr"]) is float
    assert type(group["betas"]) is tuple
    assert group["note"] == {"a": [1, 2.5, None], "b": ("x", True)}
    assert ("initial_lr" in group) == (not root)


def test_a_learning_rate_in_a_tensor_stays_the_same_object(world):
    rate = torch.tensor(0.5 if world.rank() else 0.25)
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
    optimizer = torch.optim.Adam([{"params": [w]} for w in weights], lr=rate)
    world.broadcast_optimizer_state(optimizer, 0)
    assert rate == 0.25
    assert all(group["lr"] is rate for group in optimizer.param_groups)


def test_step_is_on_the_cpu_and_counts_what_the_root_counted(world):
    model, optimizer = fresh(0, "Adam", 3 if world.rank() == 0 else 0)
    world.broadcast_optimizer_state(optimizer, 0)
    steps = [optimizer.state[p]["step"] for p in model.parameters()]
    assert all(step.device.type == "cpu" and step.item() == 3.0 for step in steps)
    assert len({step.data_ptr() for step in steps}) == len(steps)


def test_state_of_the_optimizers_own_and_python_numbers(world):
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            self.state["all"]["calls"] = self.state["all"].get("calls", 0) + 1
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["pair"] = [parameter.detach() * 2, math.pi]
            return super().step(closure)

    weight = nn.Parameter(torch.full((2,), float(world.rank())))
    optimizer = Counting([weight], lr=0.1)
    if world.rank() == 0:
        optimizer.step()
    world.broadcast_optimizer_state(optimizer, 0)
    assert optimizer.state["all"] == {"calls": 1}
    assert torch.equal(optimizer.state[weight]["pair"][0], torch.zeros(2))
    assert optimizer.state[weight]["pair"][1] == math.pi


def test_sixteen_bit_parameters_keep_their_wider_state(world):
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    if world.rank() == 0:
        optimizer.state[weight]["master"] = torch.full((3,), 1.00001)
    world.broadcast_optimizer_state(optimizer, 0)
    assert optimizer.state[weight]["master"].dtype is torch.float32
    assert torch.equal(optimizer.state[weight]["master"], torch.full((3,), 1.00001))


def test_lbfgs_is_refused(world):
    with pytest.raises(ValueError, match="LBFGS"):
        world.broadcast_optimizer_state(torch.optim.LBFGS([nn.Parameter(torch.zeros(1))]), 0)


def test_the_model_may_be_named(world):
    model, optimizer = fresh(0)
    world.broadcast_optimizer_state(optimizer, 0, model)
    world.broadcast_optimizer_state(optimizer, root_rank=0, model=model)


def differing(kind: str) -> torch.optim.Optimizer:
    a, b, wide = (nn.Parameter(torch.zeros(n)) for n in (2, 3, 4))
    if kind == "class":
        return torch.optim.SGD([a, b])
    if kind == "groups":
        return torch.optim.AdamW([{"params": [a]}, {"params": [b]}])
    return torch.optim.AdamW({"count": [a], "shape": [a, wide], "": [a, b]}[kind])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("class", "the optimizer is a SGD here and a AdamW on rank 0"),
        ("groups", "2 parameter groups here and 1 on rank 0"),
        ("count", "1 parameters in group 0 here and 2 on rank 0"),
        ("shape", r"parameter 1 of group 0 has shape \(4,\) here and \(3,\) on rank 0"),
    ],
)
def test_optimizers_that_differ(world, kind, words):
    if world.size() == 1:
        pytest.skip("nobody to differ from")
    last = world.size() - 1
    optimizer = differing(kind if world.rank() == last else "")
    with pytest.raises(world.MismatchError, match=f"rank {last}: {words}"):
        world.broadcast_optimizer_state(optimizer, 0)


# --- objects


class Point:
    def __init__(self, x: int) -> None:
        self.x = x


class Refusing:
    def __reduce__(self):
        raise OSError("it is open elsewhere")


def test_broadcast_object_from_any_root(world):
    for root in range(world.size()):
        mine = {"rank": world.rank(), "tensor": torch.full((2,), world.rank()), "nested": [None, (1, "a")]}
        got = world.broadcast_object(mine, root)
        assert got["rank"] == root
        assert torch.equal(got["tensor"], torch.full((2,), root))
        assert got["nested"] == [None, (1, "a")]
        assert (got is mine) == (world.rank() == root)


@pytest.mark.parametrize("name", [None, "thing"])
def test_none_large_and_named_objects(world, name):
    assert world.broadcast_object(None, name=name) is None
    assert world.broadcast_object(b"x" * 300_000 if world.rank() == 0 else None, name=name) == b"x" * 300_000
    assert world.allgather_object("y" * world.rank() * 100_000, name=name) == [
        "y" * rank * 100_000 for rank in range(world.size())
    ]


def test_a_class_of_the_script_is_the_same_class_on_arrival(world):
    got = world.broadcast_object(Point(world.rank()))
    assert type(got) is Point
    assert got.x == 0
    assert all(type(point) is Point for point in world.allgather_object(Point(1)))


def test_what_only_cloudpickle_can(world):
    pytest.importorskip("cloudpickle")
    rank = world.rank()
    assert world.broadcast_object(lambda x: x + rank)(10) == 10
    assert [f(10) for f in world.allgather_object(lambda x: x + rank)] == [10 + r for r in range(world.size())]


def test_allgather_object_is_a_list_by_rank_of_copies(world):
    mine = [world.rank()]
    everyone = world.allgather_object(mine)
    assert everyone == [[rank] for rank in range(world.size())]
    assert everyone[world.rank()] is not mine


def test_an_object_that_cannot_be_pickled_raises_on_every_rank(world):
    if world.size() == 1:
        return
    words = "rank 1 could not pickle its object: OSError: it is open elsewhere"
    with pytest.raises(world.MpiddpError, match=words) as caught:
        world.broadcast_object(Refusing() if world.rank() == 1 else None, 1)
    assert isinstance(caught.value.__cause__, OSError) == (world.rank() == 1)
    with pytest.raises(world.MpiddpError, match=r"could not be pickled on rank 1 \(OSError: it is open elsewhere\)$"):
        world.allgather_object(Refusing() if world.rank() == 1 else world.rank())
    assert world.broadcast_object(world.rank(), 1) == 1


def test_a_root_that_is_none(world):
    with pytest.raises(ValueError, match="root_rank"):
        world.broadcast_object(1, -1)
