"""Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055): the experts of every layer start as copies of one FFN.

From a dense model, of its FFN. From a model with one expert a modality (MoMa's 1t1i, arXiv 2407.21770), each modality's
experts of that modality's. With token choice whose weights sum to 1 the model then computes what the seed did; with
expert choice it does not, for a token gets none to all of the experts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from moe_dist.checkpoint.manifest import newest_complete, read_state
from moe_dist.checkpoint.stored_weights import read_tensors
from moe_dist.config.recipe import DenseFFN, ModelConfig, MoEFFN, SwiGLUExpertsConfig
from moe_dist.convert.output import write_model
from moe_dist.core.batch import MODALITIES
from moe_dist.core.errors import UserError
from moe_dist.core.strict import apply_override, validate
from moe_dist.core.tensor_files import LazyTensor
from moe_dist.model.moe.router import Router, Site
from moe_dist.model.moe.router_registry import build_router

ROUTER_SECTION = "model.ffn.router"
KEPT = ("loader", "vocabulary")  # of the seed's state: where it stood in its data, and with which tokenizers
_DENSE = re.compile(r"layers\.\d+\.ffn\.(gate_up|down)\.weight")
_EXPERT = re.compile(r"(layers\.\d+\.ffn\.experts\.(?:gate_up|down))\[(\d+)\]")
_NOT_COPIED = re.compile(r"layers\.\d+\.ffn\.router\..*|depth\.\d+\.router\.auxiliary\..*")

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
    """Write `out` from the checkpoint (or the newest of the run) `source`. Raises UserError.

    experts: of each layer, as `8` (top-2 of 8 with weights that sum to 1, from a dense model) or as `4t4i` (expert
    choice among the experts of each modality). `overrides` (model.ffn.router.KEY=VALUE) say otherwise. gates: fresh
    ones are drawn by `seed` as a new model's; copied, of a 1t1i model, all gates of a modality are the seed's one.
    """
    path = newest_complete(source) or Path(source)
    state = read_state(path)
    old = validate(ModelConfig, state["config"]["model"], str(path), "model")
    model = _sparse(old, _router_section(old, experts, path), overrides)
    routers = _routers(model, seed)
    if not isinstance(old.ffn, DenseFFN) and len(routers[0].expert_groups) != len(MODALITIES):
        raise UserError(f"{path} has experts for each modality, and model.ffn.router.type would not")
    if gates == "copied" and isinstance(old.ffn, DenseFFN):
        raise UserError(f"{path} holds a dense model, which has no gates to copy: use fresh ones")
    tensors: dict[str, LazyTensor] = {}
    stored = read_tensors(path)
    for name, tensor in stored.items():
        if not _NOT_COPIED.fullmatch(name):
            tensors |= _copies(name, tensor, routers[0].expert_groups)
    for layer, router in enumerate(routers):
        for key, parameter in router.named_parameters():  # type: ignore[attr-defined]
            name = f"layers.{layer}.ffn.router.{key}"
            fresh = LazyTensor.of(parameter.detach())
            tensors[name] = _repeated(stored[name], fresh) if gates == "copied" and name in stored else fresh
    tokenizer = path / "tokenizer"
    files = {f"tokenizer/{file.name}": file.read_bytes() for file in sorted(tokenizer.glob("*"))}
    vocab_size = stored["embedding.weight"].shape[0]
    kept = {key: state[key] for key in KEPT if key in state}
    write_model(out, model, vocab_size, tensors, source=f"upcycled from {path}", files=files, state=kept)


def _router_section(old: ModelConfig, experts: str, path: Path) -> dict[str, Any]:
    """The router of the new model before overrides. Raises UserError for a seed that is neither dense nor 1t1i."""
    each = re.fullmatch(r"([0-9]+)t([0-9]+)i", experts)
    if each is None and not re.fullmatch("[0-9]+", experts):
        raise UserError(f"--experts {experts}: a number, or text and image experts as 4t4i")
    if isinstance(old.ffn, DenseFFN):
        if each is None:
            number = int(experts)
            return {"type": "top_k", "num_experts": number, "top_k": min(2, number), "renormalize": True}
        children: dict[str, Any] = {name: {"type": "expert_choice"} for name in MODALITIES}
    else:
        children = {name: old.ffn.router.get(name, {}) for name in MODALITIES}
        is_seed = all(child.get("num_experts") == 1 for child in children.values())
        if not is_seed or not isinstance(old.ffn.experts, SwiGLUExpertsConfig):
            raise UserError(
                f"{path} holds a model that is neither dense nor has exactly one expert a modality (1t1i), of which "
                "more could be made"
            )
        if each is None:
            raise UserError(f"--experts {experts}: {path} has experts for each modality: say how many of each, as 4t4i")
    for name, count in zip(MODALITIES, each.groups(), strict=True):
        settings = {key: value for key, value in children[name].items() if key != "auxiliary"}
        children[name] = settings | {"num_experts": int(count)}
    return {"type": "modality", **children}


def _sparse(old: ModelConfig, router: dict[str, Any], overrides: Sequence[str]) -> ModelConfig:
    section = old.model_dump(mode="json", exclude_unset=True)
    slices = {} if isinstance(old.ffn, DenseFFN) or old.ffn.slices == 1 else {"slices": old.ffn.slices}
    section["ffn"] = {"type": "moe", "hidden_size": old.ffn.hidden_size, **slices, "router": router}
    if old.depth is not None:
        section["depth"]["auxiliary"] = False  # it knows the seed's choices only, as those of the experts do
    for override in overrides:
        if not override.startswith((f"{ROUTER_SECTION}.", f"{ROUTER_SECTION}=")):
            raise UserError(f"override '{override}': upcycling changes {ROUTER_SECTION} alone")
        apply_override({"model": section}, override)
    return validate(ModelConfig, section, "upcycle", "model")


def _routers(model: ModelConfig, seed: int) -> list[Router]:
    """Of every layer, as a new model of this seed would draw them."""
    assert isinstance(model.ffn, MoEFFN)
    return [
        build_router(
            model.ffn.router,
            Site(
                hidden_size=model.hidden_size,
                layer=layer,
                seed=seed,
                init_std=model.init_std,
                name=f"layers.{layer}.ffn.router",
            ),
        )
        for layer in range(model.num_layers)
    ]


def _copies(name: str, tensor: LazyTensor, groups: Sequence[Sequence[int]]) -> dict[str, LazyTensor]:
    """What a tensor of the seed becomes: an FFN the experts of its group (of a dense model, of all), slice by slice
    (model/moe/placement.py) where it has them; others themselves.

    A linear layer's weight is [out, in], an expert's row of a stacked one [in, out].
    """
    if _DENSE.fullmatch(name):
        prefix, key = name.removesuffix(".weight").rsplit(".", 1)
        transposed = LazyTensor(tensor.shape[::-1], tensor.dtype, lambda: tensor.read().T)
        return {f"{prefix}.experts.{key}[{expert}]": transposed for group in groups for expert in group}
    if found := _EXPERT.fullmatch(name):
        number, modality = divmod(int(found[2]), len(groups))
        first = number * sum(map(len, groups))
        return {f"{found[1]}[{first + expert}]": tensor for expert in groups[modality]}
    return {name: tensor}


def _repeated(gate: LazyTensor, like: LazyTensor) -> LazyTensor:
    """A gate of one column for as many as `like` has."""
    return LazyTensor(like.shape, gate.dtype, lambda: gate.read().expand(like.shape))
