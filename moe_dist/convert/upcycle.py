"""Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055): the experts of every layer start as copies of its dense FFN.

With token choice whose weights sum to 1 the model then computes what the dense one did.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from moe_dist.config import DenseFFN, ModelConfig, MoEFFN, apply_override, validate
from moe_dist.convert.output import write_model
from moe_dist.engine.manifest import newest_complete, read_state
from moe_dist.engine.storage import LazyTensor
from moe_dist.engine.weights import read_tensors
from moe_dist.errors import UserError
from moe_dist.moe.registry import build_router
from moe_dist.moe.router import Router, Site

ROUTER = "model.ffn.router"
_FFN = re.compile(r"layers\.\d+\.ffn\.(gate_up|down)\.weight")


def upcycle(
    source: str | Path, out: str | Path, *, num_experts: int, overrides: Sequence[str] = (), seed: int = 0
) -> None:
    """Write `out` from the checkpoint (or the newest of the run) `source` of a dense model. Raises UserError.

    The router is top-2 of num_experts with weights that sum to 1, unless `overrides` (model.ffn.router.KEY=VALUE) say
    otherwise; its gates are drawn by `seed`.
    """
    path = newest_complete(source) or Path(source)
    dense = validate(ModelConfig, read_state(path)["config"]["model"], str(path), "model")
    if not isinstance(dense.ffn, DenseFFN):
        raise UserError(f"{path} holds a model whose model.ffn.type is '{dense.ffn.type}' already, not 'dense'")
    model = _sparse(dense, num_experts, overrides)
    stored = read_tensors(path)
    tensors: dict[str, LazyTensor] = {}
    routers = _routers(model, seed)
    for name, tensor in stored.items():
        if _FFN.fullmatch(name):
            tensors |= _copies(name, tensor, routers[0].num_experts)
        else:
            tensors[name] = tensor
    for layer, router in enumerate(routers):
        for name, parameter in router.named_parameters():  # type: ignore[attr-defined]
            tensors[f"layers.{layer}.ffn.router.{name}"] = LazyTensor.of(parameter.detach())
    tokenizer = path / "tokenizer"
    files = {f"tokenizer/{file.name}": file.read_bytes() for file in sorted(tokenizer.glob("*"))}
    vocab_size = stored["embedding.weight"].shape[0]
    write_model(out, model, vocab_size, tensors, source=f"upcycled from {path}", files=files)


def _sparse(dense: ModelConfig, num_experts: int, overrides: Sequence[str]) -> ModelConfig:
    router = {"type": "top_k", "num_experts": num_experts, "top_k": min(2, num_experts), "renormalize": True}
    section = dense.model_dump(mode="json", exclude_unset=True)
    section["ffn"] = {"type": "moe", "hidden_size": dense.ffn.hidden_size, "router": router}
    for override in overrides:
        if not override.startswith((f"{ROUTER}.", f"{ROUTER}=")):
            raise UserError(f"override '{override}': upcycling changes {ROUTER} alone")
        apply_override({"model": section}, override)
    return validate(ModelConfig, section, "upcycle", "model")


def _routers(model: ModelConfig, seed: int) -> list[Router]:
    """Of every layer, as a new model of this seed would draw them."""
    assert isinstance(model.ffn, MoEFFN)
    return [
        build_router(
            model.ffn.router,
            Site(
                hidden_size=model.hidden_size, layer=layer, seed=seed, init_std=model.init_std,
                name=f"layers.{layer}.ffn.router",
            ),
        )
        for layer in range(model.num_layers)
    ]  # fmt: skip


def _copies(name: str, tensor: LazyTensor, num_experts: int) -> dict[str, LazyTensor]:
    """A linear layer's weight [out, in] as the experts' rows of a stacked one, [in, out] each."""
    prefix, key = name.removesuffix(".weight").rsplit(".", 1)
    transposed = LazyTensor(tensor.shape[::-1], tensor.dtype, lambda: tensor.read().T)
    return {f"{prefix}.experts.{key}[{expert}]": transposed for expert in range(num_experts)}
