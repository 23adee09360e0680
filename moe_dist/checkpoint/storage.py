"""Storage and planning for torch.distributed.checkpoint (DCP), with one safetensors file per rank and a JSON index.

DCP decides which rank writes which pieces, and which stored pieces fill the pieces of a new layout. The file format is
ours, because DCP's metadata file is a pickle, and a checkpoint must never be unpickled. A rank's file can be opened
with the safetensors library. Each entry of the file is a piece of a flattened tensor. The entry's key is `name@offset`.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from moe_dist.core.errors import UserError
from moe_dist.core.files import StoredFile, read_json, write_json
from moe_dist.core.tensor_files import DTYPE_NAMES, DTYPES, LazyTensor, open_safetensors, write_safetensors

FRAGMENT_INDEX = "index.json"
MAPPED = 1 << 22  # elements that are read before a file is closed and opened again


@dataclass(frozen=True, slots=True)
class Fragment:
    """A contiguous piece of one flattened logical tensor.

    The 1-D `tensor` holds the piece's values. A save reads them, and a load overwrites them.
    """

    name: str
    shape: tuple[int, ...]  # shape of the whole logical tensor
    offset: int  # start of the piece in the flattened logical tensor
    tensor: Tensor

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def index(self) -> MetadataIndex:
        return MetadataIndex(self.name, [self.offset])

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.offset]), torch.Size([self.tensor.numel()]))


class FragmentSavePlanner(DefaultSavePlanner):
    """A planner that offers this rank's fragments to DCP for writing.

    If several ranks offer the same fragment, DCP chooses one of the ranks to write it. If the fragments of all ranks
    leave a gap in a logical tensor, DCP raises an error.
    """

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.fragments = {fragment.index: fragment for fragment in fragments}

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=index,
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=fragment.chunk,
                    properties=TensorProperties(dtype=fragment.tensor.dtype),
                    size=torch.Size([fragment.numel]),
                ),
            )
            for index, fragment in self.fragments.items()
        ]
        self.plan = SavePlan(items, planner_data={f.name: f.shape for f in self.fragments.values()})
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        shapes = {name: shape for plan in all_plans for name, shape in plan.planner_data.items()}
        return plans, replace(metadata, planner_data=shapes)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.fragments[index].tensor


class FragmentLoadPlanner(DefaultLoadPlanner):
    """A planner that requests exactly this rank's fragments, however the stored tensors are divided into pieces."""

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.fragments = {fragment.index: fragment for fragment in fragments}

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        reads: list[ReadItem] = []
        for fragment in self.fragments.values():
            stored = self.metadata.state_dict_metadata[fragment.name]
            assert isinstance(stored, TensorStorageMetadata)
            found = create_read_items_for_chunk_list(fragment.name, stored, [fragment.chunk])
            if sum(item.lengths[0] for item in found) != fragment.tensor.numel():
                raise UserError(f"{FRAGMENT_INDEX}: the stored pieces of '{fragment.name}' leave a gap")
            reads += found
        return LoadPlan(reads)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.fragments[index].tensor


class ShardWriter(StorageWriter):
    """A DCP writer. Each rank writes rank_RRRRR.safetensors, one tensor at a time. Rank 0 also writes the index.

    All files are fsynced.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: set[StoredFile] = set()  # only on rank 0, after finish

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        self.files = set()

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=f"rank_{rank:05d}.safetensors") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        if plan.items:
            data = {_key(item.index): cast(Tensor, planner.resolve_data(item)) for item in plan.items}
            tensors = {key: LazyTensor.of(tensor) for key, tensor in data.items()}
            stored = write_safetensors(self.folder / plan.storage_data, tensors)
            results = [WriteResult(index=item.index, size_in_bytes=0, storage_data=stored) for item in plan.items]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        file_of = {result.index: result.storage_data.name for of_rank in results for result in of_rank}
        tensors = {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            tensors[name] = {
                "dtype": DTYPE_NAMES[stored.properties.dtype],
                "shape": metadata.planner_data[name],
                "pieces": [
                    [chunk.offsets[0], chunk.sizes[0], file_of[MetadataIndex(name, chunk.offsets)]]
                    for chunk in stored.chunks
                ],
            }
        self.files = {result.storage_data for of_rank in results for result in of_rank}
        self.files.add(write_json(self.folder / FRAGMENT_INDEX, {"tensors": tensors}))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


class ShardReader(StorageReader):
    """A DCP reader. It memory-maps a checkpoint's files and reads only the values that the load plan requests.

    metadata: the result of `read_index`.
    """

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        self.folder, self.metadata = folder, metadata

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def read_metadata(self) -> Metadata:
        return self.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self.metadata.storage_data[item.storage_index]].append(item)
        for name, items in sorted(by_file.items()):
            for batch in _batches(items):
                with open_safetensors(self.folder / name) as file:
                    for item in batch:
                        start = item.storage_offsets[0]
                        piece = file.get_slice(_key(item.storage_index))[start : start + item.lengths[0]]
                        planner.resolve_tensor(item).detach().copy_(piece)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


def _batches(items: list[ReadItem]) -> Iterator[list[ReadItem]]:
    """Divide the items to read from one file into batches of about MAPPED elements.

    The caller reopens the file for each batch, because the values read from an open file stay in memory.
    """
    batch: list[ReadItem] = []
    elements = 0
    for item in items:
        batch.append(item)
        elements += item.lengths[0]
        if elements >= MAPPED:
            yield batch
            batch, elements = [], 0
    if batch:
        yield batch


def read_index(folder: Path, verified: Collection[str]) -> Metadata:
    """Read the indexes of a checkpoint and of its store of frozen weights, and return them as DCP's metadata.

    In the metadata, storage_data maps each piece to its file, and planner_data maps each tensor to its shape.
    verified: the files that were verified, as paths relative to the folder (manifest.verify_checkpoint). Raises
    UserError if a piece is in any other file.
    """
    metadata = Metadata({}, planner_data={}, storage_data={})
    _add_index(metadata, folder, "", verified)
    for name in verified:
        if name.endswith(f"/{FRAGMENT_INDEX}"):
            _add_index(metadata, folder, name.removesuffix(FRAGMENT_INDEX), verified)
    return metadata


def _add_index(metadata: Metadata, folder: Path, inner: str, verified: Collection[str]) -> None:
    """Read one index and add its tensors to `metadata`.

    folder: the checkpoint's folder. inner: the path of the index's folder, relative to `folder`. It is empty or ends
    with a slash. verified: see read_index.
    """
    for name, entry in read_json(folder / inner / FRAGMENT_INDEX)["tensors"].items():
        shape = tuple(entry["shape"])
        pieces = [ChunkStorageMetadata(torch.Size([start]), torch.Size([size])) for start, size, _ in entry["pieces"]]
        metadata.state_dict_metadata[name] = TensorStorageMetadata(
            TensorProperties(dtype=DTYPES[entry["dtype"]]), torch.Size([math.prod(shape)]), pieces
        )
        metadata.planner_data[name] = shape
        for start, _, file in entry["pieces"]:
            if inner + file not in verified:
                index = folder / inner / FRAGMENT_INDEX
                raise UserError(f"{index} names the file {file}, which the manifest does not list")
            metadata.storage_data[MetadataIndex(name, [start])] = inner + file


def _key(index: MetadataIndex) -> str:
    assert index.offset is not None
    return f"{index.fqn}@{index.offset[0]}"
