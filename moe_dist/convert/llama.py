"""The Llama family of Hugging Face (`model_type: llama`): its config.json and its tensors as ours.

Shape suffixes: V vocabulary, D model width, F feed-forward width, H heads, G query groups, d size per head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_dist.config import ModelConfig, validate
from moe_dist.engine.storage import LazyTensor
from moe_dist.errors import UserError

REFUSED = {  # keys of config.json that would make it another model -> the value that does not
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "quantization_config": None,
}


def model_section(raw: Mapping[str, Any], where: str) -> tuple[ModelConfig, int]:
    """The recipe's `model:` section that config.json (`raw`) means, and the number of vocabulary entries.

    Raises UserError naming the key of an architecture that is not the Llama family's, or that is not supported.
    """
    if raw.get("model_type") != "llama":
        raise UserError(f"{where}: model_type={raw.get('model_type')!r} is not supported, only 'llama' is")
    for key, value in REFUSED.items():
        if raw.get(key, value) != value:
            raise UserError(f"{where}: {key}={raw[key]!r} is not supported, only {value!r} is")
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    wrong = [key for key in sizes if not isinstance(raw.get(key), int) or raw[key] < 1]
    if wrong:
        raise UserError(f"{where}: key '{wrong[0]}' is missing or is no positive whole number")
    section = {
        "hidden_size": raw["hidden_size"],
        "num_layers": raw["num_hidden_layers"],
        "num_heads": raw["num_attention_heads"],
        "num_query_groups": raw.get("num_key_value_heads") or raw["num_attention_heads"],
        "head_size": raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        "ffn": {"type": "dense", "hidden_size": raw["intermediate_size"]},
        "norm": "pre",
        "norm_epsilon": raw.get("rms_norm_eps", 1e-6),
        "qk_norm": False,
        "rope_base": _rope_base(raw, where),
        "tie_embeddings": raw.get("tie_word_embeddings", False),
        "init_std": raw.get("initializer_range", 0.02),
    }
    return validate(ModelConfig, section, where), raw["vocab_size"]


def _rope_base(raw: Mapping[str, Any], where: str) -> float:
    """rope_theta, at the top level (transformers 4) or among the rope_parameters (5)."""
    parameters = raw.get("rope_parameters") or {}
    for key, settings in (("rope_scaling", raw.get("rope_scaling") or {}), ("rope_parameters", parameters)):
        kind = settings.get("rope_type", settings.get("type", "default"))
        if kind != "default":
            raise UserError(f"{where}: {key}={kind!r} is not supported, only the plain rotary embedding is")
    for settings in (raw, parameters):
        if settings.get("partial_rotary_factor", 1) != 1:
            raise UserError(f"{where}: partial_rotary_factor={settings['partial_rotary_factor']} is not supported")
    return parameters.get("rope_theta", raw.get("rope_theta", 10000.0))


@dataclass(frozen=True, slots=True)
class Part:
    """One parameter of ours and the tensors of theirs that it is made of, stacked along the first dimension."""

    name: str
    sources: Mapping[str, tuple[int, ...]]  # their names -> shapes
    join: Callable[..., Tensor] = lambda *tensors: torch.cat(tensors)

    @property
    def shape(self) -> tuple[int, ...]:
        first, *others = self.sources.values()
        return (first[0] + sum(shape[0] for shape in others), *first[1:])


def parts(model: ModelConfig, vocab_size: int) -> Iterator[Part]:
    """Every parameter of a dense model of ours. Rotary embeddings turn both halves of a head alike in both."""
    D, F, d = model.hidden_size, model.ffn.hidden_size, model.size_per_head
    H, G = model.num_heads, model.query_groups

    def join_qkv(*projections: Tensor) -> Tensor:
        """Theirs apart; ours (megatron's) group by group: the queries of its heads, its key, its value."""
        return torch.cat([x.unflatten(0, (G, -1)) for x in projections], dim=1).flatten(0, 1)

    yield Part("embedding.weight", {"model.embed_tokens.weight": (vocab_size, D)})
    for layer in range(model.num_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        qkv = {f"{theirs}.self_attn.{key}_proj.weight": (n * d, D) for key, n in (("q", H), ("k", G), ("v", G))}
        gate_up = {f"{theirs}.mlp.{key}_proj.weight": (F, D) for key in ("gate", "up")}
        yield Part(f"{ours}.attention.core.linear_qkv.weight", qkv, join_qkv)
        yield Part(f"{ours}.attention.core.linear_proj.weight", {f"{theirs}.self_attn.o_proj.weight": (D, H * d)})
        yield Part(f"{ours}.attention_norm.weight", {f"{theirs}.input_layernorm.weight": (D,)})
        yield Part(f"{ours}.ffn.gate_up.weight", gate_up)
        yield Part(f"{ours}.ffn.down.weight", {f"{theirs}.mlp.down_proj.weight": (D, F)})
        yield Part(f"{ours}.ffn_norm.weight", {f"{theirs}.post_attention_layernorm.weight": (D,)})
    yield Part("norm.weight", {"model.norm.weight": (D,)})
    if not model.tie_embeddings:
        yield Part("output.weight", {"lm_head.weight": (vocab_size, D)})


def convert(model: ModelConfig, vocab_size: int, source: Mapping[str, LazyTensor], where: str) -> dict[str, LazyTensor]:
    """Their tensors as our parameters, float32. Raises UserError naming one that is missing, surplus or of another
    shape."""
    ours = list(parts(model, vocab_size))
    wanted = {name: shape for part in ours for name, shape in part.sources.items()}
    missing = [name for name in wanted if name not in source]
    # Frequencies that follow from rope_theta, which early conversions stored.
    surplus = [name for name in source if name not in wanted and not name.endswith(".rotary_emb.inv_freq")]
    for problem, names in (("lacks", missing), ("has no place in its config.json for", surplus)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"{where} {problem} the tensor '{names[0]}'{more}")
    for name, shape in wanted.items():
        if source[name].shape != shape:
            found = list(source[name].shape)
            raise UserError(f"{where}: the tensor '{name}' has the shape {found}, its config.json means {list(shape)}")
        if not source[name].dtype.is_floating_point:
            raise UserError(f"{where}: the tensor '{name}' holds {source[name].dtype}, not floating-point numbers")
    return {part.name: LazyTensor(part.shape, torch.float32, _reader(part, source)) for part in ours}


def _reader(part: Part, source: Mapping[str, LazyTensor]) -> Callable[[], Tensor]:
    return lambda: part.join(*(source[name].read().float() for name in part.sources))
