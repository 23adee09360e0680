"""LoRA deltas in the parameters of a checkpoint: found by their names, and merged into the weights they belong to.

Shape suffixes: D input width, O output width, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moe_dist.config.model_section import ModelConfig
from moe_dist.core.expert_rows import row_name, split_row_name
from moe_dist.core.tensor_files import LazyTensor
from moe_dist.model.lora import side_by_side

INFIX = ".lora."  # in the names of all parameters of LoRA deltas, and of no others
_PARTS = {"linear_qkv": ("q", "k", "v"), "linear_proj": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}


@dataclass(frozen=True, slots=True)
class Delta:
    """The LoRA delta A B of one part of a weight, without its scale."""

    a: LazyTensor  # [D, r]
    b: LazyTensor  # [r, O]


def parts_of(name: str) -> tuple[str, ...]:
    """Return the parts of a weight's output that can have LoRA deltas, such as ("q", "k", "v"), in order.

    name: the name of a parameter, or of one expert's row of a parameter. If the parameter cannot have LoRA deltas, the
    result is empty.
    """
    base, expert = split_row_name(name)
    module = base if expert is not None else base.removesuffix(".weight")
    if expert is None and not base.endswith(".weight"):
        return ()
    kind = module.rpartition(".")[2]
    return ("router",) if kind == "gate" and ".router." in module else _PARTS.get(kind, ())


def deltas_of(name: str, stored: Mapping[str, LazyTensor]) -> dict[str, Delta]:
    """Return the LoRA deltas of a weight, keyed by part. stored: the parameters of the checkpoint."""
    base, expert = split_row_name(name)
    module = base.rpartition(".")[0] if expert is not None else base.removesuffix(".weight")
    found = {}
    for part in parts_of(name):
        prefix = f"{module}.lora" if part == "router" else f"{module}.lora.{part}"
        names = [f"{prefix}.{key}" if expert is None else row_name(f"{prefix}.{key}", expert) for key in "ab"]
        if names[0] in stored:
            found[part] = Delta(*(stored[key] for key in names))
    return found


def without_lora(model: ModelConfig) -> ModelConfig:
    """Return the settings of the model that has the merged weights."""
    return model if model.lora is None else model.model_copy(update={"lora": None})


def merged(stored: Mapping[str, LazyTensor], model: ModelConfig) -> dict[str, LazyTensor]:
    """Merge the LoRA deltas of a checkpoint's parameters into the weights. Returns the parameters without the deltas.

    A merged weight is computed in float64 when it is read, and then rounded to float32. model: the model with LoRA; if
    it has none, the parameters are returned as they are.
    """
    if model.lora is None:
        return dict(stored)
    plain = {name: tensor for name, tensor in stored.items() if INFIX not in name}
    for name, weight in plain.items():
        if deltas := deltas_of(name, stored):
            plain[name] = LazyTensor(weight.shape, torch.float32, partial(_merge, name, weight, deltas, model))
    return plain


def _merge(name: str, weight: LazyTensor, deltas: Mapping[str, Delta], model: ModelConfig) -> Tensor:
    assert model.lora is not None
    stacked = split_row_name(name)[1] is not None  # then x W, otherwise x W^T
    size = weight.shape[1] if stacked else weight.shape[0]
    parts = parts_of(name)
    widths = {part: size // len(parts) for part in parts}
    groups = 1
    if "q" in parts:
        groups, key = model.query_groups, model.query_groups * model.size_per_head
        widths = {"q": model.num_heads * model.size_per_head, "k": key, "v": key}
    products = {part: delta.a.read().double() @ delta.b.read().double() for part, delta in deltas.items()}
    delta_DO = side_by_side(next(iter(products.values())), widths, products, groups)
    scale = model.lora.alpha / model.lora.rank
    return (weight.read().double() + scale * (delta_DO if stacked else delta_DO.t())).float()
