"""The cases of the fuzz: damaged tars, JSON members, tokenizer folders and recipes, each drawn from its number.

python -m tests.support.fuzz_cases KIND FIRST LAST    prints what becomes of these cases
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moe_dist.data.tokenizers.text_tokenizer import load_text_tokenizer, train_text_tokenizer
from moe_dist.data.tokenizers.vocabulary import Vocabulary
from moe_dist.data.tokenizers.vq import VQConfig, VQTokenizer
from tests.support import ROOT
from tests.support.fuzz_checks import (
    check_image_tokenizer,
    check_recipe_file,
    check_tar,
    check_text_tokenizer,
    outcome,
)
from tests.support.fuzz_mutations import VALUES, damage_bytes, damage_json, damage_text, damage_value
from tests.support.fuzz_tars import RECORDS, Member, damage_members, draw_members, picture, write_tar

TEXTS = ["a small red rose", "Which is red?\nAnswer: A", "caf\u00e9 text"] * 3
SPECIAL = ["<|end|>", "<|start|>", "<|pad|>"]
CHAMELEON = {
    "model_type": "chameleon_vqgan",
    "resolution": 16,
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "latent_channels": 8,
    "embed_dim": 8,
    "num_embeddings": 24,
}


@dataclass(frozen=True)
class Tokenizers:
    """Sound tokenizers in a folder, of which cases damage copies. Each is made when it is asked for."""

    folder: Path

    def path(self, name: str) -> Path:
        """Return the folder of the tokenizer text, hugging_face, vq or chameleon."""
        place = self.folder / name
        if not place.exists():
            place.mkdir(parents=True)
            _MAKERS[name](place)
        return place

    @property
    def text(self) -> Path:
        return self.path("text") / "text.model"

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The joint vocabulary of text and vq."""
        return Vocabulary(load_text_tokenizer(self.text), VQTokenizer.load(self.path("vq")))


def _sentencepiece(folder: Path) -> None:
    train_text_tokenizer(TEXTS, folder / "text.model", vocab_size=300)


def _vq(folder: Path) -> None:
    torch.manual_seed(0)
    vq = VQTokenizer(VQConfig(image_size=16, codebook_size=16, code_width=8, channels=(8, 8), blocks=1))
    vq.quantizer._codebook.initted.fill_(True)  # as after training
    vq.save(folder)


def _hugging_face(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<|start|>", "eos_token": {"content": "<|end|>"}, "pad_token": "<|pad|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | {"model_max_length": 512}))
    (folder / "special_tokens_map.json").write_text(json.dumps(named))


def _chameleon(folder: Path) -> None:
    from transformers import ChameleonVQVAE, ChameleonVQVAEConfig  # takes seconds

    torch.manual_seed(0)
    model = ChameleonVQVAE(ChameleonVQVAEConfig(**CHAMELEON))
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CHAMELEON))


_MAKERS = {"text": _sentencepiece, "hugging_face": _hugging_face, "vq": _vq, "chameleon": _chameleon}
SMALL: dict[str, Any] = {
    "seed": 0,
    "data": {"sequence_length": 64, "group_sequences": 1, "lanes": 2, "max_bad_fraction": 0.5, "image_fraction": None},
    "model": {
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "ffn": {"type": "moe", "hidden_size": 16, "router": {"type": "top_k", "num_experts": 2, "top_k": 1}},
    },
    "losses": {"load_balance": {"weight": 0.01}},
    "train": {"steps": 2, "global_batch_groups": 1},
    "schedule": {"type": "cosine", "peak_lr": 0.001},
    "deepspeed": {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}, "gradient_clipping": 1.0},
    "eval": {"every": 1, "groups": 1},
    "checkpoint": {"every": 0},
    "telemetry": {"tensorboard": False},
}


def small_recipe(folder: Path, tokenizers: Tokenizers) -> dict[str, Any]:
    """Return the settings of a run of two steps in `folder`, trained on `folder`/shards."""
    places = {
        "shards": str(folder / "shards"),
        "validation_shards": str(folder / "shards" / "good.tar"),
        "text_tokenizer": str(tokenizers.text),
        "image_tokenizer": str(tokenizers.path("vq")),
    }
    return SMALL | {"run": {"dir": str(folder / "run")}, "data": places | SMALL["data"]}


# ------------------------------------------------------------------------------------------------------------ cases


def damaged_tar(draw: Random, folder: Path) -> Path:
    """Write a tar of a few samples whose members, order or bytes may be damaged."""
    members = draw_members(draw, draw.randint(1, 6))
    for _ in range(draw.choice((0, 1, 1, 2))):
        members = damage_members(draw, members) if members else members
    return write_tar(draw, folder, members, draw.choice((0, 0, 1, 1, 2)))


def damaged_records(draw: Random, folder: Path) -> Path:
    """Write a tar of a few samples with JSON members, of which the first is damaged."""
    members = []
    for number in range(draw.randint(1, 4)):
        record = draw.choice(RECORDS)
        content = damage_json(draw, record) if number == 0 else json.dumps(record).encode()
        members += [Member(f"{number}.png", picture(number, "PNG"))] * draw.randint(0, 1)
        members.append(Member(f"{number}.json", content))
    return write_tar(draw, folder, members, 0)


def damage_tokenizer(draw: Random, folder: Path) -> None:
    """Damage a file of a tokenizer's folder."""
    file = draw.choice(sorted(folder.iterdir()))
    if draw.random() < 0.05:
        draw.choice((file.unlink, lambda: file.write_bytes(b"")))()
    elif file.suffix == ".json" and draw.random() < 0.8:
        file.write_bytes(damage_json(draw, json.loads(file.read_text())))
    elif file.suffix == ".safetensors" and draw.random() < 0.7:
        damage_tensors(draw, file)
    else:
        file.write_bytes(damage_bytes(draw, file.read_bytes()))


def damage_recipe(draw: Random, file: Path) -> None:
    """Damage the values of a recipe or its text."""
    if draw.random() < 0.6:
        data = yaml.safe_load(file.read_text())
        for _ in range(draw.choice((1, 1, 2, 3))):
            data = damage_value(draw, data)
        file.write_text(
            yaml.safe_dump(data, sort_keys=False, allow_unicode=draw.random() < 0.5), errors="surrogatepass"
        )
    else:
        file.write_bytes(damage_text(draw, file.read_text()))


def tar_case(draw: Random, folder: Path, tokenizers: Tokenizers) -> Callable[[], str]:
    path = damaged_tar(draw, folder)
    return lambda: check_tar(path, tokenizers.vocabulary)


def json_case(draw: Random, folder: Path, tokenizers: Tokenizers) -> Callable[[], str]:
    path = damaged_records(draw, folder)
    return lambda: check_tar(path, tokenizers.vocabulary)


def tokenizer_case(draw: Random, folder: Path, tokenizers: Tokenizers) -> Callable[[], str]:
    name = draw.choice(("text", "hugging_face", "hugging_face", "vq", "chameleon"))
    place = Path(shutil.copytree(tokenizers.path(name), folder / name))
    damage_tokenizer(draw, place)
    if name in ("vq", "chameleon"):
        return lambda: check_image_tokenizer(place)
    path = place / "text.model" if name == "text" else place
    return lambda: check_text_tokenizer(path)


def damage_tensors(draw: Random, file: Path) -> None:
    """Remove, rename, exchange, cast, cut or poison a tensor of a safetensors file."""
    tensors = load_file(file)
    name, other = draw.choice(sorted(tensors)), draw.choice(sorted(tensors))
    value = tensors.pop(name)
    kind = draw.randrange(7)
    if kind == 1:
        tensors[name + "_"] = value
    elif kind == 2:
        tensors |= {name: tensors.get(other, value), other: value}
    elif kind == 3:
        tensors[name] = value.to(draw.choice((torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.float64)))
    elif kind == 4:
        tensors[name] = value[: len(value) // 2] if value.dim() else value[None]
    elif kind == 5:
        tensors[name] = torch.full_like(
            value, draw.choice((float("nan"), float("inf"), 0)) if value.is_floating_point() else 0
        )
    elif kind == 6:
        tensors[name] = value.reshape(-1)
    save_file({key: part.contiguous().clone() for key, part in tensors.items()}, file)


def recipe_case(draw: Random, folder: Path, tokenizers: Tokenizers) -> Callable[[], str]:
    shutil.copytree(ROOT / "configs", folder / "configs")
    place = target = draw.choice(sorted((folder / "configs").glob("*.yaml")))
    if draw.random() < 0.3:  # one file with every section
        target.write_text(yaml.safe_dump(small_recipe(folder, tokenizers)))
    while draw.random() < 0.3 and (base := yaml.safe_load(target.read_text()).get("extends")):
        target = target.parent / base
    damage_recipe(draw, target)
    overrides = [_override(draw) for _ in range(draw.choice((0, 0, 1)))]
    return lambda: check_recipe_file(place, overrides)


def _override(draw: Random) -> str:
    section = draw.choice(
        ("data", "model", "train", "schedule", "model.ffn", "init_from", "run", "needs", "losses", "")
    )
    key = draw.choice(("shards", "hidden_size", "steps", "peak_lr", "router", "type", "dir", "rename", "", "0"))
    value = draw.choice(
        (*map(str, VALUES), "{", "[1", "&a [*a]", "!!python/name:os.system", "010", "1:30", "2026-11-28")
    )
    return f"{section}.{key}={value}"


KINDS = {"tar": tar_case, "json": json_case, "tokenizer": tokenizer_case, "recipe": recipe_case}
CASES = 500  # of each kind


def run_case(kind: str, number: int, folder: Path, tokenizers: Tokenizers) -> str:
    """Make a case in an empty folder and return what becomes of it."""
    check = KINDS[kind](Random(f"{kind} {number}"), folder, tokenizers)
    return outcome(check)


def main() -> None:
    kind, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with tempfile.TemporaryDirectory() as root:
        tokenizers = Tokenizers(Path(root, "tokenizers"))
        for number in range(first, last):
            folder = Path(root, "case")
            folder.mkdir()
            print(number, end=" ", flush=True)
            try:
                print(run_case(kind, number, folder, tokenizers).replace(str(folder), "")[:300], flush=True)
            except Exception:
                print("FAULT", traceback.format_exc().replace("\n", "\n    "), flush=True)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
