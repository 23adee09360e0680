"""A local Hugging Face folder becomes a checkpoint of ours, tensor by tensor."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_dist.convert import llama
from moe_dist.convert.output import write_model
from moe_dist.data.hf_tokenizer import TOKENIZER_FILES
from moe_dist.data.weights import CONFIG, read_json
from moe_dist.engine.storage import DTYPES, LazyTensor
from moe_dist.errors import UserError

INDEX = "model.safetensors.index.json"


def import_folder(folder: str | Path, out: str | Path) -> None:
    """Write `out`: the checkpoint, model.yaml, and tokenizer/ where the folder has one. Raises UserError."""
    folder = Path(folder)
    model, vocab_size = llama.model_section(read_json(folder / CONFIG), str(folder / CONFIG))
    tensors = llama.convert(model, vocab_size, read_folder(folder), str(folder))
    files = {f"tokenizer/{name}": (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    write_model(out, model, vocab_size, tensors, source=f"Hugging Face weights {folder}", files=files)


def read_folder(folder: str | Path) -> dict[str, LazyTensor]:
    """The tensors of the safetensors files that the folder's index names, or of all without an index; read when asked
    for. Raises UserError naming a file or tensor that is missing, twice there, or cannot be read."""
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    promised: dict[str, str] = {}
    if (folder / INDEX).is_file():
        promised = read_json(folder / INDEX).get("weight_map", {})
        files = sorted({folder / file for file in promised.values()})
    if not files:
        raise UserError(f"{folder} holds no .safetensors file")
    found = [(name, tensor) for file in files for name, tensor in _read_file(file).items()]
    tensors = dict(found)
    for name, count in Counter(name for name, _ in found).items():
        if count > 1:
            raise UserError(f"{folder} holds the tensor '{name}' in {count} files")
    for name, file in promised.items():
        if name not in tensors:
            raise UserError(f"{folder / INDEX} promises the tensor '{name}', which {file} lacks")
    return tensors


def _read_file(file: Path) -> dict[str, LazyTensor]:
    tensors = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                header = opened.get_slice(name)
                kind = header.get_dtype()
                if kind not in DTYPES:
                    raise UserError(f"{file}: the tensor '{name}' is of the type {kind}, which is not supported")
                tensors[name] = LazyTensor(tuple(header.get_shape()), DTYPES[kind], partial(_read, file, name))
    except (SafetensorError, OSError):
        raise UserError(f"{file} is missing, damaged or not a safetensors file") from None
    return tensors


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)
