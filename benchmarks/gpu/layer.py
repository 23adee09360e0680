"""One expert layer, forward and backward, against plain products and the layers of other libraries on the same card.

Shape suffixes: T tokens, R rows, D model width, E experts, C rows of each expert.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpu.check import Check
from moe_dist.config.model_section import MoEFFN
from moe_dist.core.batch import TokenInfo
from moe_dist.model.moe.moe_layer import build_moe_layer
from moe_dist.model.site import Site


class Size(NamedTuple):
    tokens: int
    width: int
    hidden: int
    experts: int
    k: int
    router: dict[str, Any]

    @property
    def rows(self) -> int:
        return self.tokens * self.k


MOMA = {"type": "modality", **{m: {"type": "expert_choice", "num_experts": 4} for m in ("text", "image")}}
SIZES = {
    "90M MoMa": Size(24576, 512, 1376, 8, 1, MOMA),
    "435M MoMa": Size(24576, 1024, 2736, 8, 1, MOMA),
    "1.4B MoMa": Size(32768, 2048, 5504, 8, 1, MOMA),
    "8 experts, top-2": Size(16384, 1024, 2816, 8, 2, {"type": "top_k", "num_experts": 8, "top_k": 2}),
    "64 experts, top-8": Size(16384, 2048, 1024, 64, 8, {"type": "top_k", "num_experts": 64, "top_k": 8}),
    "Qwen3-30B-A3B, 128 experts, top-8": Size(
        16384, 2048, 768, 128, 8, {"type": "top_k", "num_experts": 128, "top_k": 8}
    ),
}
DTYPE = torch.bfloat16


def run(check: Check) -> None:
    for name, size in SIZES.items():
        if check.small:
            size = size._replace(tokens=256, width=64, hidden=64)
        check.attempt(f"{name}, ms", lambda size=size: measured(check, size))


def measured(check: Check, size: Size) -> tuple[str, dict]:
    x_TD = draw(check, size.tokens, size.width).requires_grad_()
    g_TD = torch.randn_like(x_TD)
    layer, info = ours(check, size)
    works = {
        "bmm": plain(check, size),
        "grouped_mm": grouped(check, size),
        "ours": lambda: layer(x_TD, info)[0].backward(g_TD),
        "ours_forward": lambda: layer(x_TD, info),
        "router_forward": lambda: layer.router(x_TD, info),
    }
    found: dict[str, Any] = {name: round(check.milliseconds(work), 2) for name, work in works.items()}
    if not check.small:
        floor = 18 * size.rows * size.width * size.hidden / (check.seen("matmul_tflops") * 1e9)
        found = {"floor": round(floor, 2), **found}
    for peer in (transformers_layer, megatron_layer) if size.router["type"] == "top_k" else ():
        name = peer.__name__.removesuffix("_layer")
        try:
            found[name] = round(check.milliseconds(peer(check, size)), 2)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error)[:160]}"
    return "measured", found


def draw(check: Check, *size: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*size, dtype=DTYPE, device=check.device) * scale


def ours(check: Check, size: Size) -> tuple[nn.Module, TokenInfo]:
    ffn = MoEFFN(type="moe", hidden_size=size.hidden, router=size.router)
    site = Site(hidden_size=size.width, layer=0, seed=0, init_std=0.02, name="layers.0.ffn")
    # A run draws weights on the host, keyed by name; here the card draws them, which is faster.
    with torch.device("meta"):
        layer = build_moe_layer(ffn, site, check.layout)
    layer = layer.to_empty(device=check.device).to(DTYPE)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    info = TokenInfo.build(
        modality_T=torch.arange(size.tokens) % 2,
        valid_T=torch.ones(size.tokens, dtype=torch.bool),
        position_T=torch.arange(size.tokens),
        token_id_T=torch.arange(size.tokens),
        document_lengths=[size.tokens],
        num_groups=1,
    )
    return layer, info.to(check.device)


def weights(check: Check, size: Size) -> tuple[Tensor, Tensor]:
    up = draw(check, size.experts, size.width, 2 * size.hidden, scale=0.02).requires_grad_()
    return up, draw(check, size.experts, size.hidden, size.width, scale=0.02).requires_grad_()


def plain(check: Check, size: Size) -> Callable[[], None]:
    """Return the same products as two batched ones, with the same number of rows per expert, already in place."""
    up, down = weights(check, size)
    x_ECD = draw(check, size.experts, size.rows // size.experts, size.width).requires_grad_()
    g_ECD = torch.randn_like(x_ECD)

    def work() -> None:
        gate, value = (x_ECD @ up).chunk(2, dim=2)
        ((F.silu(gate) * value) @ down).backward(g_ECD)

    return work


def grouped(check: Check, size: Size) -> Callable[[], None]:
    up, down = weights(check, size)
    x_RD = draw(check, size.rows, size.width).requires_grad_()
    g_RD = torch.randn_like(x_RD)
    ends = torch.arange(1, size.experts + 1, dtype=torch.int32, device=check.device) * (size.rows // size.experts)

    def work() -> None:
        gate, value = F.grouped_mm(x_RD, up, offs=ends).chunk(2, dim=1)
        F.grouped_mm(F.silu(gate) * value, down, offs=ends).backward(g_RD)

    return work


def transformers_layer(check: Check, size: Size) -> Callable[[], None]:
    """Build Mixtral's layer of transformers, with its experts as one grouped product."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=size.width,
        intermediate_size=size.hidden,
        num_local_experts=size.experts,
        num_experts_per_tok=size.k,
    )
    config._experts_implementation = "grouped_mm"
    with check.device:
        block = MixtralSparseMoeBlock(config).to(DTYPE)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    x = draw(check, 1, size.tokens, size.width).requires_grad_()
    g = torch.randn_like(x)

    def work() -> None:
        y = block(x)
        (y[0] if isinstance(y, tuple) else y).backward(g)

    return work


def megatron_layer(check: Check, size: Size) -> Callable[[], None]:
    """Build megatron-core's router, permutation and GroupedMLP. torch's grouped product replaces the package that
    GroupedMLP needs.
    """

    def gmm(a: Tensor, b: Tensor, sizes: Tensor, trans_b: bool = False) -> Tensor:
        b = b.transpose(-2, -1) if trans_b else b
        return F.grouped_mm(a, b, offs=sizes.to(a.device).cumsum(0).to(torch.int32))

    package = types.ModuleType("grouped_gemm")
    package.ops = types.SimpleNamespace(gmm=gmm)  # type: ignore[attr-defined]
    sys.modules.setdefault("grouped_gemm", package)
    from megatron.core import parallel_state
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(1, 1)
        model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=size.width,
        num_attention_heads=8,
        num_moe_experts=size.experts,
        moe_router_topk=size.k,
        moe_ffn_hidden_size=size.hidden,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bf16=True,
        params_dtype=DTYPE,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        moe_grouped_gemm=True,
        bias_activation_fusion=True,
    )
    spec = get_moe_module_spec(use_te=False, num_experts=size.experts, moe_grouped_gemm=True)
    layer = build_module(spec, config=config).to(check.device)
    x = draw(check, size.tokens, 1, size.width).requires_grad_()
    g = torch.randn_like(x)
    return lambda: layer(x)[0].backward(g)
