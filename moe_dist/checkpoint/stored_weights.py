"""Reading and writing a checkpoint's parameters as whole tensors, one at a time, in one process.

Each tensor has the name of a parameter of the model. An expert's row of a stacked parameter is called
`NAME[global expert id]` (see fragments.py).

This module is for conversions and for models that will not be trained. A resumed run loads its checkpoint with
checkpoint.py.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata

from moe_dist.checkpoint.checkpoint import open_index, seal, verify_checkpoint
from moe_dist.checkpoint.fragments import FROZEN, MASTER, MODEL_KINDS
from moe_dist.checkpoint.manifest import CHECKPOINT_FORMAT
from moe_dist.checkpoint.storage import FRAGMENT_INDEX, read_index
from moe_dist.core.errors import UserError
from moe_dist.core.expert_rows import named_rows, split_row_name
from moe_dist.core.files import new_folder, write_json
from moe_dist.core.tensor_files import LazyTensor, open_safetensors, write_safetensors
from moe_dist.parallel.agreement import raise_on_all_ranks
from moe_dist.parallel.layout import Layout

FILE = "rank_00000.safetensors"


def read_tensors(path: str | Path) -> dict[str, LazyTensor]:
    """Return a checkpoint's parameters, keyed by name: float32 masters, and frozen parameters in their own dtype.

    All files are verified immediately, but a tensor is read only when it is used. If a file is damaged, raises
    UserError naming it.
    """
    path = Path(path)
    return _stored(path, read_index(path, verify_checkpoint(path)), (MASTER, FROZEN))


def fill_model(model: nn.Module, path: str | Path, layout: Layout) -> None:
    """Copy a checkpoint's parameters and buffers into a model that will not be trained. Collective.

    A stacked expert parameter is filled with the rows of this rank's experts. Parameters keep their dtype; buffers get
    the stored dtype, as in a resumed run. Raises UserError if the checkpoint is damaged or is from a different model.
    """
    path = Path(path)
    copy_tensors(model, _stored(path, open_index(path, layout), MODEL_KINDS), path)


@torch.no_grad()
def copy_tensors(model: nn.Module, stored: Mapping[str, LazyTensor], path: Path) -> None:
    """Copy tensors into a model's parameters and buffers, as `fill_model` does. Collective.

    stored: the tensors, keyed by name; an expert's row is NAME[expert]. path: the folder that error messages name.
    Raises UserError if a tensor is damaged, or if the tensors are those of a different model.
    """
    with raise_on_all_ranks():
        names = {name for name, _ in chain(model.named_parameters(), model.named_buffers())}
        surplus = [name for name in stored if split_row_name(name)[0] not in names]
        if surplus:
            raise UserError(f"{path} is a checkpoint of another model: the model has no '{surplus[0]}'")
        for name, parameter in model.named_parameters():
            for key, target in named_rows(name, parameter).items():
                target.copy_(_fitting(path, stored, key, target).read())
        persistent = model.state_dict(keep_vars=True).keys()
        for name, buffer in model.named_buffers():
            if name in persistent:
                buffer.data = _fitting(path, stored, name, buffer).read().to(buffer.device)


def _fitting(path: Path, stored: Mapping[str, LazyTensor], name: str, target: Tensor) -> LazyTensor:
    """Return the stored tensor called `name`. Raises UserError if it is missing or does not have the target's shape."""
    if name not in stored or stored[name].shape != tuple(target.shape):
        found = f"is {list(stored[name].shape)}" if name in stored else "is missing"
        raise UserError(f"{path} is a checkpoint of another model: '{name}' {found}, not {list(target.shape)}")
    return stored[name]


def _stored(path: Path, metadata: Metadata, kinds: Collection[str]) -> dict[str, LazyTensor]:
    """Return a checkpoint's tensors of the given kinds, keyed by name without the kind.

    The caller must have verified the checkpoint. Each tensor is read only when it is used.
    """
    pieces: dict[str, list[tuple[int, str]]] = {}
    for index, file in metadata.storage_data.items():
        pieces.setdefault(index.fqn, []).append((index.offset[0], file))
    found = {}
    for logical, entry in metadata.state_dict_metadata.items():
        kind, name = logical.split("/", 1)
        if kind in kinds:
            shape, dtype = metadata.planner_data[logical], entry.properties.dtype  # type: ignore[union-attr]
            read = functools.partial(_read, path, logical, sorted(pieces[logical]), shape)
            found[name] = LazyTensor(shape, dtype, read)
    return found


def write_tensors(
    path: str | Path, tensors: Mapping[str, LazyTensor], state: dict[str, Any], files: Mapping[str, bytes] | None = None
) -> None:
    """Write parameters (float32) as a checkpoint without optimizer state, with one tensor in memory at a time.

    state: the state that read_state will return; it must be JSON-serializable. files: small files to add to the folder,
    keyed by relative path. The folder is written atomically. Raises UserError if the folder exists already or cannot be
    written.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists already")
    masters = {f"{MASTER}/{name}": tensor for name, tensor in tensors.items()}
    index = {
        name: {"dtype": "F32", "shape": tensor.shape, "pieces": [[0, tensor.numel, FILE]]}
        for name, tensor in masters.items()
    }
    header = {
        "format": CHECKPOINT_FORMAT,
        "state": state,
        "optimizer": {},
        "engine": {"steps": 0, "skipped_steps": 0},
        "written_by": {"torch": torch.__version__},
    }
    try:
        with new_folder(path) as partial:
            for name, content in (files or {}).items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).write_bytes(content)
            stored = write_safetensors(partial / FILE, {f"{name}@0": _flat_float32(t) for name, t in masters.items()})
            seal(partial, [stored, write_json(partial / FRAGMENT_INDEX, {"tensors": index})], header)
    except OSError as error:
        raise UserError(f"cannot write the checkpoint {path}: {error}") from error


def _read(path: Path, logical: str, pieces: list[tuple[int, str]], shape: tuple[int, ...]) -> Tensor:
    found = []
    for start, file in pieces:
        with open_safetensors(path / file) as opened:
            found.append(opened.get_tensor(f"{logical}@{start}"))
    return torch.cat(found).view(shape)


def _flat_float32(tensor: LazyTensor) -> LazyTensor:
    return LazyTensor((tensor.numel,), torch.float32, lambda: tensor.read().float().flatten())
