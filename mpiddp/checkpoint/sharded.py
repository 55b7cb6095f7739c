"""The state of an optimizer with ``shard=True``, in the format of torch.distributed.checkpoint: a file from each rank.

Each rank writes what it holds; nobody gathers the whole. What comes out is an ordinary checkpoint of that format, of
tensors ``state.NAME.KEY`` in the parameters' shapes, so that ``dcp.load`` and ``dcp_to_torch_save`` read it, too, at
any number of ranks. torch.distributed itself is not used: the planning is done here, and only the files are torch's.
"""

from __future__ import annotations

import inspect
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load

from ..optimizer.sharded.parts import Part
from .boxes import boxes

__all__ = ["Written", "finish", "read", "write"]

#: What a rank says of what it wrote: the items, and where each lies.
Written = tuple[list[WriteItem], list[Any]]


class _Values(DefaultSavePlanner):
    """Hands out the values of the items; what else a planner does is done here."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[MetadataIndex, Any] = {}

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The tensor of an item, or the bytes of an object."""
        value = self.of[write_item.index]
        if isinstance(value, torch.Tensor):
            return value
        stream = io.BytesIO()
        torch.save(value, stream)
        return stream


def write(folder: Path, rank: int, parts: Sequence[Part]) -> Written:
    """Write this rank's file into ``folder`` and wait until it is on disk."""
    values = _Values()
    items = [item for part in parts for item in _items(part, values.of)]
    if not items:
        return [], []
    writer = FileSystemWriter(folder, thread_count=1)
    plan = writer.prepare_global_plan([SavePlan([])] * rank + [SavePlan(items)])[rank]
    return items, list(writer.write_data(plan, values).wait())


def finish(folder: Path, written: Sequence[Written]) -> None:
    """Write the table of contents, on one rank, of what all ranks have written."""
    tensors: dict[str, Any] = {}
    for item in (item for items, _ in written for item in items):
        data = item.tensor_data
        if data is None:
            tensors[item.index.fqn] = BytesStorageMetadata()
            continue
        found = tensors.setdefault(item.index.fqn, TensorStorageMetadata(data.properties, data.size, []))
        found.chunks.append(data.chunk)
    # NAME may hold dots, KEY none.
    paths = {fqn: ("state", *fqn.removeprefix("state.").rsplit(".", 1)) for fqn in tensors}
    writer = FileSystemWriter(folder)
    writer.finish(Metadata(tensors, planner_data=paths), [results for _, results in written])


def read(folder: Path, index_of: dict[str, int]) -> dict[int, dict[str, Any]]:
    """The whole state, by the index of the parameter; ``index_of`` are the parameters' names. In host memory."""
    metadata = FileSystemReader(folder).read_metadata()
    found: dict[str, Any] = {
        fqn: torch.empty(kept.size, dtype=kept.properties.dtype, device="cpu")
        if isinstance(kept, TensorStorageMetadata)
        else None
        for fqn, kept in metadata.state_dict_metadata.items()
    }
    # Whatever torch.distributed may be doing in this process is none of its business; older versions cannot be told.
    alone = {"no_dist": True} if "no_dist" in inspect.signature(load).parameters else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # that is what is wanted
        load(found, storage_reader=FileSystemReader(folder), **alone)
    state: dict[int, dict[str, Any]] = {}
    for fqn, value in found.items():
        _, name, key = metadata.planner_data[fqn]
        state.setdefault(index_of[name], {})[key] = value
    return state


def _items(part: Part, values: dict[MetadataIndex, Any]) -> list[WriteItem]:
    items = []
    for key, flat in part.elements.items():
        for box in boxes(part.size, part.stride, part.lo, part.hi):
            view = box.of(flat[box.lo - part.lo : box.hi - part.lo])
            items.append(_tensor_item(f"state.{part.name}.{key}", view, box.offsets, part.size, values))
    for key, value in part.scalars.items():
        fqn = f"state.{part.name}.{key}"
        if isinstance(value, torch.Tensor):
            items.append(_tensor_item(fqn, value, (0,) * value.dim(), tuple(value.shape), values))
        else:
            items.append(WriteItem(MetadataIndex(fqn), WriteItemType.BYTE_IO))
            values[items[-1].index] = value
    return items


def _tensor_item(
    fqn: str, value: torch.Tensor, offsets: tuple[int, ...], size: tuple[int, ...], values: dict[MetadataIndex, Any]
) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(offsets), value.shape)
    data = TensorWriteData(chunk, TensorProperties(dtype=value.dtype), torch.Size(size))
    index = MetadataIndex(fqn, offsets)
    values[index] = value.detach()
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)
