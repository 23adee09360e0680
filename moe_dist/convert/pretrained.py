"""Conversion of a Hugging Face folder to one of our models.

The result has a `model:` section, and tensors with our names. Each tensor is read from the disk only when it is
used. Files and tensors that are known to be superfluous are skipped and listed in PretrainedModel.dropped. Any other
surplus tensor is an error.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_dist.config.model_section import ModelConfig
from moe_dist.convert.families.family_registry import family_of
from moe_dist.convert.tensor_maps import TensorMapping, from_theirs
from moe_dist.core.errors import UserError
from moe_dist.core.files import read_json
from moe_dist.core.tensor_files import DTYPES, LazyTensor, open_safetensors
from moe_dist.data.tokenizers.text_tokenizer import has_tokenizer, load_text_tokenizer
from moe_dist.data.tokenizers.tokenizer_weights import CONFIG, WEIGHTS
from moe_dist.data.tokenizers.vocabulary import Vocabulary

WEIGHT_INDEX = f"{WEIGHTS}.index.json"
HEAD = "lm_head.weight"  # the output layer in every family
ROTARY = ".rotary_emb.inv_freq"  # old conversions stored the rotary frequencies, which follow from config.json
EMBEDDING = "embedding.weight"  # our name


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainedModel:
    """The model of a Hugging Face folder."""

    folder: Path
    model: ModelConfig  # the settings in it that are set follow from config.json
    vocab_size: int  # rows of the embedding
    tensors: Mapping[str, LazyTensor]  # float32, keyed by our names; an expert's row is NAME[expert]
    dropped: tuple[str, ...]  # files and tensors that are not used, each with the reason


def is_pretrained(folder: str | Path) -> bool:
    """Return True if `folder` is a Hugging Face folder: it has a config.json and is not one of our checkpoints."""
    return (Path(folder) / CONFIG).is_file()


def open_pretrained(folder: str | Path) -> PretrainedModel:
    """Open a Hugging Face folder. No tensor is read, except to compare a tied output layer with the embedding.

    If the folder's tokenizer has fewer ids than the embedding has rows (a padded vocabulary), `model.vocab_size` is set
    to the number of rows. Raises UserError if the folder holds no complete, supported model, or if its tokenizer has
    more ids than the embedding has rows.
    """
    folder = Path(folder)
    where = str(folder / CONFIG)
    raw = read_json(folder / CONFIG)
    family = family_of(raw, where)
    model, vocab_size = family.model_section(raw, where)
    mappings = list(family.tensor_mappings(model, vocab_size))
    found, unused_files = read_folder(folder)
    used, unused_tensors = _without_known_surplus(found, mappings, str(folder))
    if _is_padded(folder, vocab_size):
        model = model.model_copy(update={"vocab_size": vocab_size})
    return PretrainedModel(
        folder=folder,
        model=model,
        vocab_size=vocab_size,
        tensors=from_theirs(mappings, used, str(folder)),
        dropped=(*unused_files, *unused_tensors),
    )


def folder_digest(folder: Path) -> str:
    """Return a SHA-256 digest of the folder's config.json and of all its safetensors files."""
    with ThreadPoolExecutor() as pool:
        parts = pool.map(_file_digest, [folder / CONFIG, *sorted(folder.glob("*.safetensors"))])
        return hashlib.sha256("".join(parts).encode()).hexdigest()


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_padded(folder: Path, rows: int) -> bool:
    """Return True if the folder has a tokenizer and the embedding has more rows than the tokenizer's vocabulary.

    Raises UserError if it has fewer rows than the tokenizer has tokens.
    """
    if not has_tokenizer(folder):
        return False
    tokenizer = load_text_tokenizer(folder)
    if tokenizer.size > rows:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.size} tokens, the embedding has only {rows} rows")
    return Vocabulary(tokenizer).size < rows


def _without_known_surplus(
    found: Mapping[str, LazyTensor], mappings: Iterable[TensorMapping], where: str
) -> tuple[dict[str, LazyTensor], list[str]]:
    """Drop redundant tensors: stored rotary frequencies, and an output layer that is tied to the embedding.

    Returns the remaining tensors, and one line of text for each kind of dropped tensor, with the reason. Raises
    UserError if the output layer of a model with tied embeddings differs from the embedding.
    """
    sources = {part.name: list(part.sources) for part in mappings}
    wanted = {name for names in sources.values() for name in names}
    rotary = [name for name in found if name.endswith(ROTARY) and name not in wanted]
    dropped = [f"tensors *{ROTARY} ({len(rotary)}): follow from {CONFIG}"] if rotary else []
    (embedding,) = sources[EMBEDDING]
    used = {name: tensor for name, tensor in found.items() if name not in rotary}
    if HEAD in used and HEAD not in wanted and embedding in used:
        if not _equal(used.pop(HEAD), used[embedding]):
            raise UserError(
                f"{where}: {CONFIG} ties the embeddings, but the tensor '{HEAD}' differs from '{embedding}': set "
                "tie_word_embeddings to false to use both"
            )
        dropped.append(f"tensor {HEAD}: equal to the tied embedding")
    return used, dropped


def _equal(one: LazyTensor, other: LazyTensor) -> bool:
    return one.shape == other.shape and torch.equal(one.read().to(other.dtype), other.read())


def read_folder(folder: str | Path) -> tuple[dict[str, LazyTensor], list[str]]:
    """Return a Hugging Face folder's tensors, and a list of its weight files that are not used.

    If the folder has an index, the tensors are read from the files that the index names. If it has no index, they are
    read from model.safetensors. If it has neither, they are read from all safetensors files.
    Raises UserError naming a file or tensor that is missing, duplicated or unreadable.
    """
    folder = Path(folder)
    present = sorted(folder.glob("*.safetensors"))
    promised: dict[str, str] = {}
    files, reason = present, ""
    if (folder / WEIGHT_INDEX).is_file():
        promised = _weight_map(folder / WEIGHT_INDEX)
        files, reason = sorted({folder / file for file in promised.values()}), f"not named by {WEIGHT_INDEX}"
    elif (folder / WEIGHTS).is_file():
        files, reason = [folder / WEIGHTS], f"not {WEIGHTS}"
    if not files:
        raise UserError(_no_weights(folder))
    found = [(name, tensor) for file in files for name, tensor in _read_file(file).items()]
    tensors = dict(found)
    for name, count in Counter(name for name, _ in found).items():
        if count > 1:
            raise UserError(f"{folder} holds the tensor '{name}' in {count} files")
    for name, file in promised.items():
        if name not in tensors:
            raise UserError(f"{folder / WEIGHT_INDEX} promises the tensor '{name}', which {file} lacks")
    return tensors, [f"file {file.name}: {reason}" for file in present if file not in files]


def _weight_map(index: Path) -> dict[str, str]:
    """Return the index's dict from tensor name to file name. Raises UserError if the index is damaged."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(_is_file_name(file) for file in found.values()):
        raise UserError(f"{index} is damaged: its weight_map does not name a file of this folder for every tensor")
    return found


def _is_file_name(file: object) -> bool:
    return isinstance(file, str) and file == Path(file).name


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if not pickles:
        return f"{folder} holds no .safetensors file"
    return (
        f"{folder} holds {pickles[0]} but no .safetensors file, and pickled weights are not read: load the model with "
        "transformers and save it with save_pretrained, which writes safetensors"
    )


def _read_file(file: Path) -> dict[str, LazyTensor]:
    tensors = {}
    with open_safetensors(file) as opened:
        for name in opened.keys():  # noqa: SIM118 - not a mapping
            header = opened.get_slice(name)
            kind = header.get_dtype()
            if kind not in DTYPES:
                raise UserError(f"{file}: the tensor '{name}' is of the type {kind}, which is not supported")
            read = functools.partial(_read_one, file, name)
            tensors[name] = LazyTensor(tuple(header.get_shape()), DTYPES[kind], read)
    return tensors


def _read_one(file: Path, name: str) -> Tensor:
    with open_safetensors(file) as opened:
        tensor: Tensor = opened.get_tensor(name)
    if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float32)):
        raise UserError(f"{file}: the tensor '{name}' holds NaN or infinite numbers")
    return tensor
