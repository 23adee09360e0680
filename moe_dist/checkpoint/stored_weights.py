"""The parameters in a checkpoint without the model or its ranks: read and written one whole tensor at a time.

Names are the model's, with an expert's row of a stacked parameter as `NAME[global expert id]` (see fragments.py). For
conversions; a run loads a checkpoint by checkpoint.py, at its own layout.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.checkpoint.checkpoint import seal, verify_checkpoint
from moe_dist.checkpoint.fragments import FROZEN, MASTER
from moe_dist.checkpoint.manifest import CHECKPOINT_FORMAT
from moe_dist.checkpoint.storage import FRAGMENT_INDEX, read_index
from moe_dist.core.errors import UserError
from moe_dist.core.files import new_folder, write_json
from moe_dist.core.tensor_files import LazyTensor, open_safetensors, write_safetensors

FILE = "rank_00000.safetensors"


def read_tensors(path: str | Path) -> dict[str, LazyTensor]:
    """The parameters of a checkpoint (the float32 masters, frozen ones in their own dtype), by name.

    Verifies the files first; the tensors are read when they are asked for. Raises UserError naming a damaged file.
    """
    path = Path(path)
    metadata = read_index(path, verify_checkpoint(path))
    pieces: dict[str, list[tuple[int, str]]] = {}
    for index, file in metadata.storage_data.items():
        pieces.setdefault(index.fqn, []).append((index.offset[0], file))
    found = {}
    for logical, entry in metadata.state_dict_metadata.items():
        kind, name = logical.split("/", 1)
        if kind in (MASTER, FROZEN):
            shape, dtype = metadata.planner_data[logical], entry.properties.dtype  # type: ignore[union-attr]
            read = functools.partial(_read, path, logical, sorted(pieces[logical]), shape)
            found[name] = LazyTensor(shape, dtype, read)
    return found


@torch.no_grad()
def fill_parameters(model: nn.Module, path: str | Path) -> None:
    """Fill a model's parameters from a checkpoint, of experts those that it holds; for what is not to be trained.

    Every rank reads for itself. Raises UserError where the checkpoint is damaged or of another model.
    """
    stored = read_tensors(path)
    for name, parameter in model.named_parameters():
        experts = getattr(parameter, "expert_ids", None)
        own = {name: parameter} if experts is None else {f"{name}[{e}]": row for e, row in zip(experts, parameter)}
        for key, target in own.items():
            if key not in stored or stored[key].shape != tuple(target.shape):
                found = f"is {list(stored[key].shape)}" if key in stored else "is missing"
                raise UserError(f"{path} is a checkpoint of another model: '{key}' {found}, not {list(target.shape)}")
            target.copy_(stored[key].read())


def write_tensors(
    path: str | Path, tensors: Mapping[str, LazyTensor], state: dict[str, Any], files: Mapping[str, bytes] | None = None
) -> None:
    """Write parameters (float32) as a checkpoint without an optimizer's state, one tensor in memory at a time.

    `state` is JSON-able, what `read_state` returns; `files`: small files to lie beside it, by relative path. The folder
    appears when it is complete. Raises UserError where it is there already or cannot be written.
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
