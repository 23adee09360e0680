"""Conversion between local Hugging Face folders and checkpoints, in both directions.

Tensors are read and converted one at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moe_dist.checkpoint.manifest import newest_complete, read_state
from moe_dist.checkpoint.stored_weights import read_tensors
from moe_dist.config.recipe import stored_model
from moe_dist.convert.families.family_registry import family_for
from moe_dist.convert.lora_weights import merged, without_lora
from moe_dist.convert.output import section_yaml, write_model
from moe_dist.convert.pretrained import WEIGHT_INDEX, open_pretrained
from moe_dist.convert.tensor_maps import to_theirs
from moe_dist.core.errors import UserError
from moe_dist.core.files import new_folder, write_file, write_json
from moe_dist.core.tensor_files import LazyTensor, write_safetensors
from moe_dist.data.tokenizers.text_tokenizer import TOKENIZER_FILES
from moe_dist.data.tokenizers.tokenizer_weights import CONFIG

SHARD_BYTES = 5 * 10**9  # per file, the default of transformers


def import_folder(folder: str | Path, out: str | Path) -> tuple[str, ...]:
    """Import a Hugging Face folder: write a checkpoint, model.yaml and the tokenizer (if the folder has one) to `out`.

    Returns the files and tensors of the folder that were dropped. Raises UserError if the folder holds no complete,
    supported model, or if `out` exists or cannot be written.
    """
    folder = Path(folder)
    found = open_pretrained(folder)
    files = {f"tokenizer/{name}": (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    source = f"Hugging Face weights {folder}"
    write_model(out, found.model, found.vocab_size, found.tensors, source=source, files=files)
    return found.dropped


def write_section(folder: str | Path, out: str | Path) -> None:
    """Write the `model:` section of a Hugging Face folder to the YAML file `out`.

    Raises UserError if the folder holds no complete, supported model, or if `out` exists or cannot be written.
    """
    found, out = open_pretrained(folder), Path(out)
    if out.exists():
        raise UserError(f"{out} exists already")
    try:
        write_file(out, section_yaml(found.model, f"Hugging Face weights {folder}").encode())
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error


def export_folder(
    source: str | Path, out: str | Path, *, dtype: str = "float32", shard_bytes: int = SHARD_BYTES
) -> None:
    """Export a checkpoint, or a run's newest checkpoint, to the Hugging Face folder `out`. LoRA deltas are merged.

    The folder holds sharded safetensors, their index and config.json, and the checkpoint's tokenizer files, if any.
    dtype: float32 (the dtype of checkpoints), bfloat16 or float16.
    Raises UserError if `source` holds no usable checkpoint, if the model has a setting that no family
    supports, or if `out` exists or cannot be written.
    """
    path = newest_complete(source) or Path(source)
    model = stored_model(read_state(path)["config"], str(path))
    stored, model = merged(read_tensors(path), model), without_lora(model)
    vocab_size = stored["embedding.weight"].shape[0]
    family, config = family_for(model, vocab_size, str(path))
    tensors = to_theirs(family.tensor_mappings(model, vocab_size), stored, getattr(torch, dtype), str(path))
    write_folder(out, config | {"torch_dtype": dtype}, tensors, tokenizer=path / "tokenizer", shard_bytes=shard_bytes)


def write_folder(
    out: str | Path, config: dict[str, Any], tensors: Mapping[str, LazyTensor], *, tokenizer: Path, shard_bytes: int
) -> None:
    """Write a Hugging Face folder, one tensor at a time. The folder appears at `out` only when it is complete.

    config: the content of config.json. tokenizer: a folder whose files are copied; it may be missing. shard_bytes: the
    maximum size of a safetensors file, unless a single tensor is larger. Raises UserError if `out` exists or cannot be
    written.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists already")
    shards = _shards(tensors, shard_bytes)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    try:
        with new_folder(out) as partial:
            for name, shard in zip(names, shards, strict=True):
                write_safetensors(partial / name, shard, {"format": "pt"})
            places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            size = sum(tensor.nbytes for tensor in tensors.values())
            write_json(partial / WEIGHT_INDEX, {"metadata": {"total_size": size}, "weight_map": places})
            write_json(partial / CONFIG, config)
            for file in sorted(tokenizer.glob("*")):
                shutil.copyfile(file, partial / file.name)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error


def _shards(tensors: Mapping[str, LazyTensor], limit: int) -> list[dict[str, LazyTensor]]:
    """Split the tensors, in order, into shards of at most `limit` bytes.

    A tensor that is larger than the limit gets its own shard.
    """
    shards: list[dict[str, LazyTensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + tensor.nbytes > limit:
            shards.append({})
        shards[-1][name] = tensor
    return shards
