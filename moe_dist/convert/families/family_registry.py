"""Registry of the families of Hugging Face models.

`family_of` finds the family of a config.json. `family_for` finds a family that can describe one of our models.

To add a family, write one class in this folder and add one line here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_dist.config.model_section import DenseFFN, ModelConfig
from moe_dist.convert.families.deepseek_moe import DeepSeekMoE
from moe_dist.convert.families.family import JSON, Family
from moe_dist.convert.families.llama import Llama
from moe_dist.convert.families.mistral import Mistral
from moe_dist.convert.families.mixtral import Mixtral
from moe_dist.convert.families.olmoe import OLMoE
from moe_dist.convert.families.qwen2 import Qwen2
from moe_dist.convert.families.qwen2_moe import Qwen2MoE
from moe_dist.convert.families.qwen3 import Qwen3
from moe_dist.convert.families.qwen3_moe import Qwen3MoE
from moe_dist.core.errors import UserError
from moe_dist.core.strict import Strict

DENSE: tuple[Family, ...] = (Llama(), Mistral(), Qwen2(), Qwen3())
SPARSE: tuple[Family, ...] = (Mixtral(), OLMoE(), Qwen3MoE(), Qwen2MoE(), DeepSeekMoE())
FAMILIES = {family.model_type: family for family in (*DENSE, *SPARSE)}

COMMON = {  # settings that all families have
    "norm": "pre",
    "depth": None,
    "lora": None,
    "ffn.experts.type": "swiglu",
    "ffn.slices": 1,
    "ffn.router.type": "top_k",
    "ffn.router.score": "softmax",
    "ffn.router.weighting": "score",
    "ffn.router.bias": False,
    "ffn.router.capacity_factor": None,
}
NOT_STORED = {  # vocab_size: config.json has the number of rows, which import compares with the tokenizer
    "vocab_size",
    "recompute",
    "embedding_init_std",
    "ffn.router.drop_policy",
    "ffn.router.pad_to_capacity",
}


def family_of(raw: Mapping[str, Any], where: str) -> Family:
    """Return the family of the model that a config.json describes.

    where: the path of the file, for the error message. Raises UserError if its model_type is not supported.
    """
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{where}: model_type={kind!r} is not supported, only {', '.join(FAMILIES)} are")
    return FAMILIES[kind]


def family_for(model: ModelConfig, vocab_size: int, where: str) -> tuple[Family, JSON]:
    """Return a family that can describe a model, and the model's config.json.

    A family can describe a model if converting the model to a config.json and back does not change it.

    where: the beginning of the error message. Raises UserError if no family can describe the model. The message names a
    setting that is not supported.
    """
    none = f"{where} has no Hugging Face architecture"
    for key, value in COMMON.items():
        if (ours := _setting(model, key, value)) != value:
            shown = "not null" if isinstance(ours, Strict) else repr(ours)
            raise UserError(f"{none}: model.{key} is {shown}, Hugging Face's models have {value!r}")
    if model.hidden_size % model.num_heads:
        raise UserError(
            f"{none}: model.hidden_size={model.hidden_size} is not a multiple of model.num_heads={model.num_heads}"
        )
    candidates = []
    for family in DENSE if isinstance(model.ffn, DenseFFN) else SPARSE:
        raw = family.config_json(model, vocab_size)
        theirs, _ = family.model_section(raw, where)
        candidates.append((_differences(model, theirs), family, raw))
    differences, family, raw = min(candidates, key=lambda candidate: len(candidate[0]))
    for key, (ours, theirs) in differences.items():
        raise UserError(
            f"{none}: model.{key} is {ours!r}; the closest architecture, {family.model_type}, has {theirs!r}"
        )
    return family, raw


def _setting(model: ModelConfig, key: str, default: Any) -> Any:
    """Return the setting with a dotted name, such as `ffn.router.score`.

    If the model has no such setting, return `default`. For example, a dense model has no router.
    """
    value: Any = model
    for name in key.split("."):
        if not hasattr(value, name):
            return default
        value = getattr(value, name)
    return value


def _differences(model: ModelConfig, other: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ between two models, as a dict from dotted name to both values.

    Settings that a config.json does not contain are ignored.
    """
    ours, theirs = _flat(model), _flat(other)
    keys = [key for key in {**ours, **theirs} if key not in NOT_STORED and ours.get(key) != theirs.get(key)]
    return {key: (ours.get(key), theirs.get(key)) for key in keys}


def _flat(model: ModelConfig) -> dict[str, Any]:
    """Return the settings of a model, keyed by their dotted names.

    Settings that may differ between layers are listed layer by layer, so two notations for one model give one result.
    """
    layers = range(model.num_layers)
    found = dict(_leaves(model.model_dump(exclude={"layers", "sliding_window"}), ""))
    found |= {"head_size": model.size_per_head, "num_query_groups": model.query_groups}
    found["sliding_window"] = [model.window_of(layer) for layer in layers]
    found["layers"] = [
        None if (ffn := model.ffn_of(layer)) == model.ffn else (ffn.type, ffn.hidden_size) for layer in layers
    ]
    return found


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
