"""Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055): the experts of every layer start as copies of one FFN.

The seed is a dense model, or a model with one expert per modality (1t1i in MoMa, arXiv 2407.21770). From a dense seed,
all experts are copies of the seed's FFN. From a 1t1i seed, the experts of a modality are copies of that modality's
expert. If the new router is token choice with weights that sum to 1, the new model computes the same function as the
seed. If the new router is expert choice, the new model computes a different function, because any number of experts may
choose a token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from moe_dist.checkpoint.manifest import newest_complete, read_state
from moe_dist.checkpoint.stored_weights import read_tensors
from moe_dist.config.model_section import DenseFFN, ModelConfig, MoEFFN, SwiGLUExpertsConfig
from moe_dist.config.recipe import stored_model
from moe_dist.convert.lora_weights import merged, without_lora
from moe_dist.convert.output import write_model
from moe_dist.core.batch import MODALITIES
from moe_dist.core.errors import UserError
from moe_dist.core.expert_rows import row_name, split_row_name
from moe_dist.core.strict import apply_override, validate
from moe_dist.core.tensor_files import LazyTensor
from moe_dist.model.moe.auxiliary_router import AuxiliaryRouter
from moe_dist.model.moe.moe_layer import MoELayer
from moe_dist.model.moe.placement import slice_id
from moe_dist.model.moe.router import Router
from moe_dist.model.moe.router_registry import build_router
from moe_dist.model.moe.swiglu import SwiGLU
from moe_dist.model.site import block_site
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout

ROUTER_SECTION = "model.ffn.router"
KEPT = ("loader", "vocabulary")  # entries kept from the seed's state: its position in the data, and its tokenizers

Gates = Literal["fresh", "copied"]


def upcycle(
    source: str | Path,
    out: str | Path,
    *,
    experts: str,
    gates: Gates = "fresh",
    overrides: Sequence[str] = (),
    seed: int = 0,
) -> None:
    """Upcycle the checkpoint `source`, or the newest checkpoint of the run `source`, to the folder `out`.

    The model in the checkpoint is called the seed model. If it has LoRA deltas, they are merged into its weights.
    Raises UserError if `source` holds no usable checkpoint, if the options do not suit the seed model, or if `out`
    exists or cannot be written.
    experts: the number of experts per layer. "8" (dense seed model only) means top-2 routing among 8 experts, with
    weights that sum to 1. "4t4i" means expert choice among 4 text and 4 image experts.
    overrides: changes to the router that `experts` describes, each given as model.ffn.router.KEY=VALUE.
    gates: "fresh" initialises the gates at random, as in a new model whose random seed is `seed`. "copied" (1t1i seed
    model only) gives every expert of a modality the gate of the seed model's expert for that modality.
    """
    path = newest_complete(source) or Path(source)
    state = read_state(path)
    seed_model = stored_model(state["config"], str(path))
    old = without_lora(seed_model)
    model = _sparse(old, _router_section(old, experts, path), overrides)
    stored = merged(read_tensors(path), seed_model)
    vocab_size = stored["embedding.weight"].shape[0]
    before, after = _on_meta(old, vocab_size), _on_meta(model, vocab_size)
    routers = _routers(model, after, seed)
    groups = next(iter(routers.values())).expert_groups
    if not isinstance(old.ffn, DenseFFN) and len(groups) != len(MODALITIES):
        raise UserError(f"{path} has experts for each modality, but model.ffn.router.type does not")
    if gates == "copied" and isinstance(old.ffn, DenseFFN):
        raise UserError(f"{path} holds a dense model, which has no gates to copy: use fresh ones")
    tensors: dict[str, LazyTensor] = {}
    left_out, stacked = _not_copied(before), _stacked(before, after)
    for name, tensor in stored.items():
        if name not in left_out:
            tensors |= _copies(name, tensor, stacked, groups)
    for prefix, router in routers.items():
        for key, parameter in router.named_parameters():  # type: ignore[attr-defined]
            name = f"{prefix}.{key}"
            fresh = LazyTensor.of(parameter.detach())
            tensors[name] = _repeated(stored[name], fresh) if gates == "copied" and name in stored else fresh
    tokenizer = path / "tokenizer"
    files = {f"tokenizer/{file.name}": file.read_bytes() for file in sorted(tokenizer.glob("*"))}
    kept = {key: state[key] for key in KEPT if key in state}
    write_model(out, model, vocab_size, tensors, source=f"upcycled from {path}", files=files, state=kept)


def _router_section(old: ModelConfig, experts: str, path: Path) -> dict[str, Any]:
    """Return the new model's router section before overrides.

    Raises UserError if the seed is neither dense nor 1t1i, or if `experts` does not suit the seed.
    """
    each = re.fullmatch(r"([0-9]+)t([0-9]+)i", experts)
    if each is None and not re.fullmatch("[0-9]+", experts):
        raise UserError(f"--experts {experts}: give a number, or text and image experts as 4t4i")
    if isinstance(old.ffn, DenseFFN):
        if each is None:
            number = int(experts)
            return {"type": "top_k", "num_experts": number, "top_k": min(2, number), "renormalize": True}
        children: dict[str, Any] = {name: {"type": "expert_choice"} for name in MODALITIES}
    else:
        parts = old.ffn.router.children().items()
        children = {name: child.model_dump(mode="json", exclude_unset=True) for name, child in parts}
        is_seed = children and all(child.get("num_experts") == 1 for child in children.values())
        if not is_seed or not isinstance(old.ffn.experts, SwiGLUExpertsConfig):
            raise UserError(
                f"{path} holds a model that is neither dense nor has exactly one expert per modality (1t1i), so it "
                "cannot be upcycled"
            )
        if each is None:
            raise UserError(f"--experts {experts}: {path} has experts for each modality: give two numbers, as 4t4i")
    for name, count in zip(MODALITIES, each.groups(), strict=True):
        settings = {key: value for key, value in children[name].items() if key != "auxiliary"}
        children[name] = settings | {"num_experts": int(count)}
    return {"type": "modality", **children}


def _sparse(old: ModelConfig, router: dict[str, Any], overrides: Sequence[str]) -> ModelConfig:
    section = old.model_dump(mode="json", exclude_unset=True)
    slices = {} if isinstance(old.ffn, DenseFFN) or old.ffn.slices == 1 else {"slices": old.ffn.slices}
    section["ffn"] = {"type": "moe", "hidden_size": old.ffn.hidden_size, **slices, "router": router}
    if old.depth is not None:
        section["depth"]["auxiliary"] = False  # trained on the seed's choices only, like those of expert choice
    for override in overrides:
        if not override.startswith((f"{ROUTER_SECTION}.", f"{ROUTER_SECTION}=")):
            raise UserError(f"override '{override}': upcycling changes {ROUTER_SECTION} alone")
        apply_override({"model": section}, override)
    return validate(ModelConfig, section, "upcycle", "model")


def _on_meta(model: ModelConfig, vocab_size: int) -> Transformer:
    """Build a model on the meta device, without allocating memory, to learn the names of its parameters."""
    with torch.device("meta"):
        return Transformer(model, vocab_size, Layout(), seed=0)


def _name(model: Transformer, part: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)


def _moe_layers(model: Transformer) -> list[MoELayer]:
    return [module for module in model.modules() if isinstance(module, MoELayer)]


def _routers(model: ModelConfig, built: Transformer, seed: int) -> dict[str, Router]:
    """Build every layer's router, keyed by name, and initialise it as in a new model whose random seed is `seed`."""
    assert isinstance(model.ffn, MoEFFN)
    names = [_name(built, layer.get_submodule("router")) for layer in _moe_layers(built)]
    sites = [replace(block_site(model, layer, seed), name=name) for layer, name in enumerate(names)]
    return {site.name: build_router(model.ffn.router, site) for site in sites}


def _not_copied(before: Transformer) -> set[str]:
    """Return the names of the parameters that are not copied: those of the seed's routers and auxiliary routers."""
    parts = [layer.get_submodule("router") for layer in _moe_layers(before)]
    parts += [module for module in before.modules() if isinstance(module, AuxiliaryRouter)]
    return {f"{_name(before, part)}.{key}" for part in parts for key, _ in part.named_parameters()}


def _stacked(before: Transformer, after: Transformer) -> dict[str, str]:
    """Map names of the seed's feed-forward weights to names of the stacked parameters that hold their copies."""
    found: dict[str, str] = {}
    experts = [layer.get_submodule("experts") for layer in _moe_layers(after)]
    sources = [layer.get_submodule("experts") for layer in _moe_layers(before)]
    sources = sources or [module for module in before.modules() if isinstance(module, SwiGLU)]
    for source, target in zip(sources, experts, strict=True):
        old, new = _name(before, source), _name(after, target)
        found |= {f"{old}.{key}": f"{new}.{key.removesuffix('.weight')}" for key, _ in source.named_parameters()}
    return found


def _copies(
    name: str, tensor: LazyTensor, stacked: Mapping[str, str], groups: Sequence[Sequence[int]]
) -> dict[str, LazyTensor]:
    """Return the tensors of the new model that are made from one tensor of the seed, keyed by name.

    A weight of a dense FFN is copied to all experts. A weight of a 1t1i expert is copied to the experts of its
    modality, slice by slice if experts are split into slices (model/moe/placement.py). Any other tensor is kept
    unchanged. A linear layer's weight is [out, in], but an expert's row of a stacked parameter is [in, out], so weights
    of a dense FFN are transposed.
    """
    parameter, expert = split_row_name(name)
    if parameter not in stacked:
        return {name: tensor}
    every = [number for group in groups for number in group]
    if expert is None:
        transposed = LazyTensor(tensor.shape[::-1], tensor.dtype, lambda: tensor.read().T)
        return {row_name(stacked[name], number): transposed for number in every}
    number, modality = divmod(expert, len(groups))
    copies = [slice_id(number, copy, len(every)) for copy in groups[modality]]
    return {row_name(stacked[parameter], copy): tensor for copy in copies}


def _repeated(gate: LazyTensor, like: LazyTensor) -> LazyTensor:
    """Expand the gate of a single expert to the shape of `like`, so that every expert gets a copy."""
    return LazyTensor(like.shape, gate.dtype, lambda: gate.read().expand(like.shape))
