"""Conversion between Hugging Face's config.json (for Llama and Mixtral) and the `model:` section of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moe_dist.config.model_section import DenseFFN, DepthConfig, LoRAConfig, ModelConfig
from moe_dist.convert.tensor_maps import TensorMapping, tensor_mappings
from moe_dist.core.errors import UserError
from moe_dist.core.strict import validate

DEFAULTS: dict[str, dict[str, Any]] = {  # by model_type: defaults of keys that config.json may omit
    "llama": {"rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    "mixtral": {
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}
REFUSED = {  # keys of config.json -> the only value that this model supports
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "sliding_window": None,
    "quantization_config": None,
}
# Both have pre-norm and plain attention. Mixtral routes to the top k dropless, with softmax weights renormalised.
ARCHITECTURE = {"norm": "pre", "qk_norm": False, "attention_lora": None, "depth": None}
ROUTER_SETTINGS = {
    "type": "top_k",
    "score": "softmax",
    "renormalize": True,
    "weighting": "score",
    "bias": False,
    "capacity_factor": None,
}


def model_section(raw: Mapping[str, Any], where: str) -> tuple[ModelConfig, int]:
    """Convert the config.json of a Llama or Mixtral model to a `model:` section. Also return the vocabulary size.

    raw: the content of config.json. where: its path, for error messages. Raises UserError if a key is missing or
    invalid, or if its value is not supported.
    """
    kind = raw["model_type"]
    raw = {**DEFAULTS[kind], **raw}
    for key, value in REFUSED.items():
        if raw.get(key, value) != value:
            raise UserError(f"{where}: {key}={raw[key]!r} is not supported, only {value!r} is")
    sizes = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
    sizes += ["num_local_experts", "num_experts_per_tok"] if kind == "mixtral" else []
    wrong = [key for key in sizes if not isinstance(raw.get(key), int) or raw[key] < 1]
    if wrong:
        raise UserError(f"{where}: key '{wrong[0]}' is missing or is not a positive integer")
    ffn: dict[str, Any] = {"type": "dense", "hidden_size": raw["intermediate_size"]}
    if kind == "mixtral":
        router = {"num_experts": raw["num_local_experts"], "top_k": raw["num_experts_per_tok"], "renormalize": True}
        ffn |= {"type": "moe", "router": {"type": "top_k"} | router}
    section = {
        "hidden_size": raw["hidden_size"],
        "num_layers": raw["num_hidden_layers"],
        "num_heads": raw["num_attention_heads"],
        "num_query_groups": raw.get("num_key_value_heads") or raw["num_attention_heads"],
        "head_size": raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        "ffn": ffn,
        "norm": "pre",
        "norm_epsilon": raw["rms_norm_eps"],
        "qk_norm": False,
        "rope_base": _rope_base(raw, where),
        "tie_embeddings": raw.get("tie_word_embeddings", False),
        "init_std": raw.get("initializer_range", 0.02),
    }
    return validate(ModelConfig, section, where), raw["vocab_size"]


def _rope_base(raw: Mapping[str, Any], where: str) -> float:
    """Return the value of rope_theta in a config.json.

    The key is at the top level (transformers 4) or in rope_parameters (transformers 5). Raises UserError if the rotary
    embedding is scaled or partial. where: the path of config.json, for error messages.
    """
    parameters = raw.get("rope_parameters") or {}
    for key, settings in (("rope_scaling", raw.get("rope_scaling") or {}), ("rope_parameters", parameters)):
        kind = settings.get("rope_type", settings.get("type", "default"))
        if kind != "default":
            raise UserError(f"{where}: {key}={kind!r} is not supported, only the plain rotary embedding is")
    for settings in (raw, parameters):
        if settings.get("partial_rotary_factor", 1) != 1:
            raise UserError(f"{where}: partial_rotary_factor={settings['partial_rotary_factor']} is not supported")
    return parameters.get("rope_theta", raw["rope_theta"])


def config_json(model: ModelConfig, vocab_size: int, dtype: str, where: str) -> dict[str, Any]:
    """Return a config.json for a model, in a form that transformers 4 and 5 can read.

    The function model_section converts the result back to the same settings.
    dtype: the name of the weights' dtype. where: the path of the checkpoint, for error messages. Raises UserError if
    the model has a setting that neither Llama nor Mixtral supports.
    """
    none = f"{where} has no Hugging Face architecture"
    found = {f"model.{key}": (getattr(model, key), value) for key, value in ARCHITECTURE.items()}
    if not isinstance(model.ffn, DenseFFN):
        router = model.ffn.router.model_dump()
        found["model.ffn.experts.type"] = (model.ffn.experts.type, "swiglu")
        found["model.ffn.slices"] = (model.ffn.slices, 1)
        found |= {f"model.ffn.router.{key}": (router.get(key), value) for key, value in ROUTER_SETTINGS.items()}
    for key, (ours, theirs) in found.items():
        if ours != theirs:
            shown = "not null" if isinstance(ours, LoRAConfig | DepthConfig) else repr(ours)
            raise UserError(f"{none}: {key} is {shown}, Llama and Mixtral have {theirs!r}")
    if model.hidden_size % model.num_heads:
        raise UserError(
            f"{none}: model.hidden_size={model.hidden_size} is not a multiple of model.num_heads={model.num_heads}"
        )
    raw: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    raw |= {"attention_bias": False, "mlp_bias": False}
    if not isinstance(model.ffn, DenseFFN):
        raw = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": None}
        raw |= {"num_local_experts": router["num_experts"], "num_experts_per_tok": router["top_k"]}
    return raw | {
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.size_per_head,
        "hidden_act": "silu",
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": None,  # the tokenizer has them; if omitted, transformers assumes 1 and 2
        "eos_token_id": None,
        "torch_dtype": dtype,
    }


@dataclass(frozen=True, slots=True)
class Family:
    """The functions that convert one family of Hugging Face models.

    All models of a family have the same keys in config.json and the same tensor names.
    """

    model_section: Callable[[Mapping[str, Any], str], tuple[ModelConfig, int]]  # config.json, its path
    tensor_mappings: Callable[[ModelConfig, int], Iterator[TensorMapping]]  # the section, the vocabulary size


FAMILIES: dict[str, Family] = {  # by model_type
    "llama": Family(model_section, tensor_mappings),
    "mixtral": Family(model_section, tensor_mappings),
}


def family_of(raw: Mapping[str, Any], where: str) -> Family:
    """Return the family of the model that a config.json describes.

    raw: the content of config.json. where: its path, for error messages. Raises UserError if the model type is not
    supported.
    """
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{where}: model_type={kind!r} is not supported, only {', '.join(FAMILIES)} are")
    return FAMILIES[kind]
