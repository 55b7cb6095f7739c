"""The names, parameters and defaults that scripts written for Horovod's PyTorch API count on. No MPI here."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import mpiddp

NONE, EVERYONE = mpiddp.Compression.none, mpiddp.global_process_set
REQUIRED = inspect.Parameter.empty

OP = {"op": None, "prescale_factor": 1.0, "postscale_factor": 1.0, "process_set": EVERYONE}
REDUCE = {"tensor": REQUIRED, "average": None, "name": None, **OP}
REDUCE_GROUP = {"tensors": REQUIRED, "average": None, "name": None, **OP}
COMPRESSED = {"average": None, "name": None, "compression": NONE, **OP}
NAMED = {"name": None, "process_set": EVERYONE}
ROOTED = {"tensor": REQUIRED, "root_rank": REQUIRED, **NAMED}
SCATTER = {"op": mpiddp.Average, "process_set": EVERYONE, "prescale_factor": 1.0, "postscale_factor": 1.0}

#: The parameters in order, with their defaults. Ours may have more behind them.
SIGNATURES: dict[str, dict[str, Any]] = {
    "init": {"comm": None, "process_sets": None},
    "allreduce": {"tensor": REQUIRED, **COMPRESSED},
    "allreduce_": REDUCE,
    "allreduce_async": REDUCE,
    "allreduce_async_": REDUCE,
    "grouped_allreduce": {"tensors": REQUIRED, **COMPRESSED},
    "grouped_allreduce_": REDUCE_GROUP,
    "grouped_allreduce_async": REDUCE_GROUP,
    "grouped_allreduce_async_": REDUCE_GROUP,
    "sparse_allreduce_async": {"tensor": REQUIRED, "name": REQUIRED, "op": mpiddp.Average, "process_set": EVERYONE},
    "allgather": {"tensor": REQUIRED, **NAMED},
    "allgather_async": {"tensor": REQUIRED, **NAMED},
    "grouped_allgather": {"tensors": REQUIRED, **NAMED},
    "grouped_allgather_async": {"tensors": REQUIRED, **NAMED},
    "broadcast": ROOTED,
    "broadcast_": ROOTED,
    "broadcast_async": ROOTED,
    "broadcast_async_": ROOTED,
    "alltoall": {"tensor": REQUIRED, "splits": None, **NAMED},
    "alltoall_async": {"tensor": REQUIRED, "splits": None, **NAMED},
    "reducescatter": {"tensor": REQUIRED, "name": None, "compression": NONE, **SCATTER},
    "reducescatter_async": {"tensor": REQUIRED, "name": None, **SCATTER},
    "grouped_reducescatter": {"tensors": REQUIRED, "name": None, "compression": NONE, **SCATTER},
    "grouped_reducescatter_async": {"tensors": REQUIRED, "name": None, **SCATTER},
    "poll": {"handle": REQUIRED},
    "synchronize": {"handle": REQUIRED},
    "join": {"device": -1},
    "barrier": {"process_set": EVERYONE},
    "broadcast_parameters": {"params": REQUIRED, "root_rank": REQUIRED},
    "broadcast_optimizer_state": {"optimizer": REQUIRED, "root_rank": REQUIRED, "model": None},
    "broadcast_object": {"obj": REQUIRED, "root_rank": 0, "name": None, "process_set": EVERYONE},
    "allgather_object": {"obj": REQUIRED, "name": None},
    "DistributedOptimizer": {
        "optimizer": REQUIRED, "named_parameters": None, "compression": NONE, "backward_passes_per_step": 1,
        "op": mpiddp.Average, "gradient_predivide_factor": 1.0, "num_groups": 0, "groups": None,
        "sparse_as_dense": False, "process_set": EVERYONE,
    },
    "ProcessSet": {"ranks_or_comm": REQUIRED},
    "add_process_set": {"process_set": REQUIRED},
    "remove_process_set": {"process_set": REQUIRED},
    "SyncBatchNorm": {
        "num_features": REQUIRED, "eps": 1e-5, "momentum": 0.1, "affine": True, "track_running_stats": True
    },
    "start_timeline": {"file_path": REQUIRED, "mark_cycles": False},
    "stop_timeline": {},
    "elastic.run": {"func": REQUIRED},
    "elastic.TorchState": {"model": None, "optimizer": None},
    "elastic.ElasticSampler": {"dataset": REQUIRED, "shuffle": True, "seed": 0},
}  # fmt: skip

WITHOUT_ARGUMENTS = (
    "shutdown", "is_initialized", "rank", "size", "local_rank", "local_size", "cross_rank", "cross_size",
    "is_homogeneous", "mpi_threads_supported", "mpi_enabled", "mpi_built", "gloo_enabled", "gloo_built", "nccl_built",
    "ddl_built", "ccl_built", "cuda_built", "rocm_built",
)  # fmt: skip


def called(path: str) -> Any:
    found: Any = mpiddp
    for name in path.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("path", SIGNATURES)
def test_parameters(path: str) -> None:
    given = list(inspect.signature(called(path)).parameters.values())
    wanted = SIGNATURES[path]
    shared, further = given[: len(wanted)], given[len(wanted) :]
    assert [parameter.name for parameter in shared] == list(wanted)
    for parameter in shared:
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        default, want = parameter.default, wanted[parameter.name]
        assert default is want or (want is not REQUIRED and default == want) or parameter.name == "root_rank"
    for parameter in further:
        optional = parameter.default is not REQUIRED or parameter.kind is inspect.Parameter.VAR_KEYWORD
        assert optional, f"{path} cannot be called without {parameter.name}"


@pytest.mark.parametrize("name", WITHOUT_ARGUMENTS)
def test_without_parameters(name: str) -> None:
    assert not inspect.signature(called(name)).parameters


def test_every_public_name_is_there_and_says_what_it_is() -> None:
    assert {path.split(".")[0] for path in SIGNATURES} | set(WITHOUT_ARGUMENTS) <= set(mpiddp.__all__)
    for name in ("Average", "Sum", "Adasum", "Min", "Max", "Product", "Compression", "HorovodInternalError"):
        assert name in mpiddp.__all__
    for name in mpiddp.__all__:
        found = getattr(mpiddp, name)
        if inspect.isfunction(found) or inspect.isclass(found):
            assert inspect.getdoc(found), f"{name} has no docstring"


def test_what_errors_are() -> None:
    assert issubclass(mpiddp.HorovodInternalError, RuntimeError)
    assert issubclass(mpiddp.DuplicateNameError, ValueError)
    assert issubclass(mpiddp.NotInitializedError, ValueError)
    assert issubclass(mpiddp.ArgumentError, ValueError)


def test_before_init() -> None:
    assert mpiddp.is_initialized() is False
    for name in ("rank", "size", "local_rank", "local_size", "cross_rank", "cross_size", "is_homogeneous"):
        with pytest.raises(ValueError, match=r"init\(\)"):
            called(name)()
    tensor = torch.ones(2)
    for call in (
        mpiddp.mpi_threads_supported,
        mpiddp.join,
        mpiddp.barrier,
        lambda: mpiddp.allreduce(tensor),
        lambda: mpiddp.grouped_allreduce_async([tensor]),
        lambda: mpiddp.broadcast_object(3),
        lambda: mpiddp.add_process_set([0]),
        lambda: mpiddp.DistributedOptimizer(torch.optim.SGD([tensor], lr=0.1)),
    ):
        with pytest.raises(ValueError, match=r"init\(\)"):
            call()
    mpiddp.shutdown()  # does nothing


def test_what_it_is_made_of() -> None:
    """As Horovod's scripts ask, before init too."""
    assert mpiddp.mpi_built() and mpiddp.mpi_enabled()
    for name in ("gloo_enabled", "gloo_built", "nccl_built", "ddl_built", "ccl_built"):
        assert not called(name)()
    assert mpiddp.cuda_built() is (torch.version.cuda is not None)
    assert mpiddp.rocm_built() is (torch.version.hip is not None)


def test_what_is_exported_where() -> None:
    for name in ("compress", "decompress"):
        assert callable(getattr(mpiddp.Compression.none, name)) and callable(getattr(mpiddp.Compression.fp16, name))
    for name in ("commit", "save", "restore", "sync", "reset", "register_reset_callbacks"):
        assert callable(getattr(mpiddp.elastic.TorchState, name))
    for name in ("set_epoch", "record_batch", "state_dict", "load_state_dict"):
        assert callable(getattr(mpiddp.elastic.ElasticSampler, name))
    assert callable(mpiddp.SyncBatchNorm.convert_sync_batchnorm)


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_compression(name: str) -> None:
    """Wider floats become 16 bits and come back; everything else is left alone."""
    compressor, dtype = called(f"Compression.{name}"), {"fp16": torch.float16, "bf16": torch.bfloat16}[name]
    for wide in (torch.float32, torch.float64):
        tensor = torch.tensor([1.0, -2.5], dtype=wide)
        packed, context = compressor.compress(tensor)
        assert packed.dtype == dtype
        assert torch.equal(compressor.decompress(packed, context), tensor)
    for other in (torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.bool):
        packed, context = compressor.compress(torch.ones(2).to(other))
        assert packed.dtype == other and compressor.decompress(packed, context).dtype == other
    tensor = torch.ones(2)
    packed, context = mpiddp.Compression.none.compress(tensor)
    assert packed is tensor and mpiddp.Compression.none.decompress(packed, context) is tensor
