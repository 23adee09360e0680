"""Export of LoRA deltas in the adapter format of PEFT, for the transformers model that has the same weights.

In transformers 5, the experts of a layer are two stacked parameters. PEFT adapts a parameter by `target_parameters`.
The gate and up deltas of an expert become one delta of the fused parameter, whose rank is the sum of both. The layout
is described in docs/weights.md, "LoRA".

Shapes: D input width, O output width, R rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.checkpoint.manifest import newest_complete, read_state
from moe_dist.checkpoint.stored_weights import read_tensors
from moe_dist.config.model_section import LoRASection, ModelConfig, MoEFFN
from moe_dist.config.recipe import stored_model
from moe_dist.convert.families.family import Family
from moe_dist.convert.families.family_registry import family_for
from moe_dist.convert.lora_weights import INFIX, Delta, deltas_of, parts_of, without_lora
from moe_dist.core.errors import UserError
from moe_dist.core.expert_rows import split_row_name
from moe_dist.core.files import new_folder, write_json
from moe_dist.core.name_patterns import matches_any
from moe_dist.core.tensor_files import LazyTensor, write_safetensors
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout

ADAPTERS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names
OWN_ADAPTERS, OWN_CONFIG = "lora.safetensors", "lora.json"


def export_adapters(source: str | Path, out: str | Path) -> str:
    """Write the trained LoRA deltas of a checkpoint, or of a run's newest checkpoint, to the new folder `out`.

    If a Hugging Face family describes the model, the folder is a PEFT adapter. Otherwise it holds our own parameters.
    Returns a description of the folder. Raises UserError if the model has no LoRA, if the run also trained parameters
    that a PEFT adapter cannot hold, or if `out` exists or cannot be written.
    """
    path, out = newest_complete(source) or Path(source), Path(out)
    config, stored = read_state(path)["config"], read_tensors(path)
    model = stored_model(config, str(path))
    if not any(INFIX in name for name in stored):
        raise UserError(f"{path} holds a model without LoRA, so there are no adapters to export")
    if out.exists():
        raise UserError(f"{out} exists already")
    vocab_size = stored["embedding.weight"].shape[0]
    trained = _trained(model, vocab_size, config.get("trainable", [f"*{INFIX}*"]))
    try:
        family = family_for(without_lora(model), vocab_size, str(path))[0]
    except UserError:  # no family has such a model
        tensors = {name: tensor for name, tensor in stored.items() if split_row_name(name)[0] in trained}
        _write(out, {OWN_ADAPTERS: tensors}, {OWN_CONFIG: {"model": model.model_dump(mode="json")}})
        return f"no PEFT adapter, because no Hugging Face family has such a model, but {OWN_ADAPTERS}"
    if others := [name for name in trained if INFIX not in name]:
        raise UserError(
            f"{path}: the run also trained '{others[0]}', which a PEFT adapter cannot hold: export the merged model"
        )
    adapter = _adapter(family, model, vocab_size, stored)
    _write(out, {ADAPTERS: adapter.tensors}, {ADAPTER_CONFIG: adapter.config()})
    return "PEFT adapter"


def _trained(model: ModelConfig, vocab_size: int, trainable: Iterable[str]) -> list[str]:
    """Return the names of the parameters that a run trains. trainable: the name patterns from its recipe."""
    with torch.device("meta"):
        built = Transformer(model, vocab_size, Layout(), seed=0)
    named = built.named_parameters()
    return [name for name, parameter in named if parameter.requires_grad and matches_any(name, trainable)]


def _write(out: Path, tensors: Mapping[str, Mapping[str, LazyTensor]], files: Mapping[str, dict[str, Any]]) -> None:
    try:
        with new_folder(out) as partial_folder:
            for name, content in tensors.items():
                write_safetensors(partial_folder / name, content, {"format": "pt"})
            for name, about in files.items():
                write_json(partial_folder / name, about)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error


@dataclass(slots=True)
class PeftAdapter:
    """A PEFT adapter: its tensors, and the modules and parameters of transformers' model that it adapts."""

    lora: LoRASection
    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    modules: set[str] = field(default_factory=set)  # names without the layer, such as self_attn.q_proj
    parameters: set[str] = field(default_factory=set)  # such as mlp.experts.down_proj
    multiples: dict[str, int] = field(default_factory=dict)  # rank of a parameter's delta, in multiples of lora.rank

    def add(self, module: str, a: LazyTensor, b: LazyTensor) -> None:
        """Add the factors a [R, D] and b [O, R] of a delta. module: the module's name in transformers."""
        self.tensors |= {f"base_model.model.{module}.lora_{key}.weight": x for key, x in (("A", a), ("B", b))}

    def config(self) -> dict[str, Any]:
        """Return the content of adapter_config.json.

        PEFT supports no dropout on parameters. If the adapter adapts any, lora_dropout is 0.
        """
        rank, alpha = self.lora.rank, self.lora.alpha
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None,
            "inference_mode": True,
            "bias": "none",
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": 0.0 if self.parameters else self.lora.dropout,
            "target_modules": sorted(self.modules),
            "target_parameters": sorted(self.parameters) or None,
            "rank_pattern": {name: rank * number for name, number in self.multiples.items()},
            "alpha_pattern": {name: alpha * number for name, number in self.multiples.items()},
        }


def _adapter(family: Family, model: ModelConfig, vocab_size: int, stored: Mapping[str, LazyTensor]) -> PeftAdapter:
    """Convert the LoRA deltas of a checkpoint's parameters to a PEFT adapter for the family's transformers model."""
    assert model.lora is not None
    adapter, experts = PeftAdapter(model.lora), defaultdict[tuple[str, str], list[dict[str, Delta]]](list)
    for mapping in family.tensor_mappings(model, vocab_size):
        deltas = deltas_of(mapping.name, stored)
        sources = [source.replace(f".{family.names.block}.", ".mlp.") for source in mapping.sources]
        if deltas and family.stacks_experts and split_row_name(mapping.name)[1] is not None:
            module, parameter = f"{sources[0].rpartition('.experts.')[0]}.experts", parts_of(mapping.name)[-1]
            experts[module, parameter].append(deltas)
            continue
        for part, source in zip(parts_of(mapping.name), sources, strict=False):
            if part in deltas:
                _add_linear(adapter, source, deltas[part], as_parameter=_is_parameter(family, model, part, source))
    for (module, parameter), of_experts in experts.items():
        # PEFT wraps the module once for each parameter. The inner wrapper is that of the first parameter.
        inner = ".base_layer" if parameter == "up" and (module, "down") in experts else ""
        _add_experts(adapter, module, parameter, of_experts, inner)
    return adapter


def _is_parameter(family: Family, model: ModelConfig, part: str, source: str) -> bool:
    """Return True if PEFT must adapt a weight as a parameter, not as a linear layer.

    Routers are not linear layers. If a model has stacked experts, PEFT would also mistake the linear layers
    of feed-forward parts for experts because of their names.
    """
    return part == "router" or (family.stacks_experts and isinstance(model.ffn, MoEFFN) and "self_attn" not in source)


def _add_linear(adapter: PeftAdapter, source: str, delta: Delta, *, as_parameter: bool) -> None:
    """Add the delta of one weight matrix. source: the name of the weight in transformers' model.

    as_parameter: whether PEFT adapts the weight as a parameter, not as a linear layer.
    """
    module = source.removesuffix(".weight")
    within = module.split(".", 3)[3]  # without "model.layers.N."
    if as_parameter:
        adapter.parameters.add(f"{within}.weight")
    else:
        adapter.modules.add(within)
    adapter.add(module, *(_computed(x.shape[::-1], partial(_transposed, x)) for x in (delta.a, delta.b)))


def _transposed(tensor: LazyTensor) -> Tensor:
    return tensor.read().t()


def _add_experts(adapter: PeftAdapter, module: str, last: str, of_experts: list[dict[str, Delta]], inner: str) -> None:
    """Add the deltas of the experts' stacked parameter: gate_up_proj if `last` is "up", down_proj if it is "down"."""
    parts, kind = (("gate", "up"), "gate_up_proj") if last == "up" else (("down",), "down_proj")
    name = f"{module.split('.', 3)[3]}.{kind}"
    adapter.parameters.add(name)
    adapter.multiples |= {name: len(of_experts[0])} if len(of_experts[0]) > 1 else {}
    first = next(iter(of_experts[0].values()))
    (width_in, rank), width_out, number = first.a.shape, first.b.shape[1] * len(parts), len(of_experts)
    rank *= len(of_experts[0])

    def a() -> Tensor:
        return torch.stack([torch.cat([d.a.read().t() for d in deltas.values()]) for deltas in of_experts]).flatten(
            0, 1
        )

    def b() -> Tensor:
        return torch.stack([_block_diagonal(deltas, parts) for deltas in of_experts], dim=2).flatten(1)

    shapes = (rank * number, width_in), (width_out, rank * number)
    adapter.add(f"{module}{inner}", _computed(shapes[0], a), _computed(shapes[1], b))


def _block_diagonal(deltas: Mapping[str, Delta], parts: tuple[str, ...]) -> Tensor:
    """Combine the B factors of an expert's parts into a block-diagonal matrix [O, R].

    If a part has no delta, its rows are zero.
    """
    found = [delta.b.read().t() for delta in deltas.values()]
    joined = torch.block_diag(*found)
    size = len(found[0])
    rows = {part: piece for part, piece in zip(deltas, joined.split(size), strict=True)}
    return torch.cat([rows.get(part, joined.new_zeros(size, joined.shape[1])) for part in parts])


def _computed(shape: tuple[int, ...], make: Callable[[], Tensor]) -> LazyTensor:
    return LazyTensor(shape, torch.float32, lambda: make().float())
