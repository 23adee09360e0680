"""The attention module, built from megatron-core's SelfAttention. This is the only file that imports megatron.

SelfAttention provides the fused projection of queries, keys and values, and the order of the computation. The function
`attention_spec` fills the slots of SelfAttention with modules that need neither Transformer Engine nor CUDA nor
megatron's global parallel state. The rotary embedding is ours, because megatron recomputes cosines and sines in every
layer. There is no tensor or context parallelism, so each process group passed to megatron consists of one rank.

Shape suffixes: T tokens, D model width, H heads, G query groups, d size per head.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config.model_section import ModelConfig
from moe_dist.core.costs import LayerWork, Product, linear_product, no_products
from moe_dist.core.fused import fused
from moe_dist.core.initial_values import constant_
from moe_dist.model.attention import Attending, Documents, RotatedDocuments, locate_documents
from moe_dist.model.lora import DroppedDocuments, LoRALinear
from moe_dist.model.site import Site

with warnings.catch_warnings():  # megatron warns four times about packages that are not used here
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.spec_utils import ModuleSpec, build_module
    from megatron.core.transformer.transformer_config import TransformerConfig


class OneRankGroup:
    """Stand-in for a process group of one rank.

    Megatron requires a process group for each parallel dimension, even if the dimension is unused.
    """

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


class Linear(nn.Linear):
    """PyTorch's Linear with the interface of megatron's linear layers.

    The constructor takes megatron's arguments. The forward pass returns (output, None). If the layer has a bias, the
    output includes it.
    """

    def __init__(self, input_size: int, output_size: int, *, bias: bool, **_tensor_parallel_settings):
        super().__init__(input_size, output_size, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None

    def products(self, rows: int) -> list[Product]:
        return [linear_product(self, rows)]


class AdaptedLinear(LoRALinear):
    """LoRALinear with the interface of megatron's linear layers.

    adapters: the arguments of LoRALinear that megatron does not pass.
    """

    def __init__(
        self, input_size: int, output_size: int, *, adapters: dict[str, Any], bias: bool, **_tensor_parallel_settings
    ):
        super().__init__(input_size, output_size, **adapters, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


class HeadLayerNorm(nn.LayerNorm):
    """LayerNorm over each query or key head, applied before the rotary embedding (Chameleon, arXiv 2405.09818)."""

    def __init__(self, *, hidden_size: int, config: TransformerConfig, eps: float):
        super().__init__(hidden_size, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return _layer_norm(x, self.weight, self.bias, self.eps)


class HeadRMSNorm(nn.RMSNorm):
    """RMSNorm of queries or keys, applied before the rotary embedding.

    Every `heads` consecutive heads are normalised as one vector. Qwen3 normalises each head by itself. OLMoE (arXiv
    2409.02060) normalises all heads as one vector.
    """

    def __init__(self, *, hidden_size: int, config: TransformerConfig, eps: float, heads: int = 1):
        super().__init__(heads * hidden_size, eps=eps)

    def forward(self, x_T1Hd: Tensor) -> Tensor:
        return (
            super()
            .forward(x_T1Hd.unflatten(2, (-1, self.normalized_shape[0] // x_T1Hd.shape[3])).flatten(3))
            .view_as(x_T1Hd)
        )


@fused
def _layer_norm(x: Tensor, weight_d: Tensor, bias_d: Tensor, eps: float) -> Tensor:
    """Normalise each head.

    On GPUs, the function is compiled. Torch's own kernel would use one thread block per head, which is slow for small
    heads.
    """
    return F.layer_norm(x, weight_d.shape, weight_d, bias_d, eps)


class DocumentAttention(nn.Module):
    """Module that computes attention within documents, for the core-attention slot of SelfAttention.

    The `attention_mask` given to SelfAttention must be an Attending object. SelfAttention passes it to this module
    unchanged, and this module calls the object's method `attend`.
    """

    def __init__(self, **_settings):
        super().__init__()

    def forward(
        self, query_T1Hd: Tensor, key_T1Gd: Tensor, value_T1Gd: Tensor, attention_mask: Attending, **_unused
    ) -> Tensor:
        output_THd = attention_mask.attend(query_T1Hd.squeeze(1), key_T1Gd.squeeze(1), value_T1Gd.squeeze(1))
        return output_THd.flatten(1).unsqueeze(1)


class Attention(nn.Module):
    """Causal self-attention within documents, with RoPE and grouped queries (Ainslie et al., arXiv 2305.13245).

    Norms of queries and keys are optional, and so is LoRA.
    """

    def __init__(self, config: ModelConfig, site: Site):
        super().__init__()
        core = site.child("core")
        self.core = build_module(
            attention_spec(config, core),
            config=megatron_config(config),
            layer_number=site.layer + 1,
            pg_collection=ProcessGroupCollection(tp=OneRankGroup(), cp=OneRankGroup()),
        )
        core.draw(self.core.linear_qkv.weight, "linear_qkv.weight")
        core.draw(self.core.linear_proj.weight, "linear_proj.weight", onto_residual=True)
        for bias in self._biases():
            constant_(bias, 0.0)
        self.window, self.clip = config.window_of(site.layer), config.clip_qkv

    def forward(self, x_TD: Tensor, token_id_T: Tensor, documents: Documents, turn_2T1d: Tensor) -> Tensor:
        """Return the attention output y_TD. T may be 0.

        token_id_T: global token ids, which seed the dropout of LoRA. turn_2T1d: the result of `rotation`.
        """
        if not len(x_TD):  # megatron fails on 0 tokens: add a zero token and cut it off. Weights get zero gradients.
            alone, ids, turn = locate_documents([1], device=x_TD.device, dtype=x_TD.dtype), token_id_T, turn_2T1d
            return self(F.pad(x_TD, (0, 0, 0, 1)), F.pad(ids, (0, 1)), alone, F.pad(turn, (0, 0) * 2 + (0, 1)))[:0]
        attending: Attending = RotatedDocuments(documents, turn_2T1d, self.window, self.clip)
        qkv, projection = self._projections()
        if isinstance(qkv, LoRALinear):
            x_TD = qkv.with_dropout(x_TD, token_id_T)
        if isinstance(projection, LoRALinear):
            attending = DroppedDocuments(attending, projection, token_id_T)
        output_T1D, _ = self.core(x_TD.unsqueeze(1), attention_mask=attending)
        return output_T1D.squeeze(1)

    def products(self, work: LayerWork) -> list[Product]:
        return [
            *self.core.linear_qkv.products(work.tokens),
            no_products(*self._head_norms()),
            Product(2 * self.core.linear_proj.in_features * work.pairs(self.window), None),
            *self.core.linear_proj.products(work.tokens),
        ]

    def num_parameters(self) -> int:
        """Return the number of parameters of the projections and the head norms.

        The weights of a projection are counted as its multiply-adds for one token. The two numbers are equal.
        """
        of_token = self.products(LayerWork(document_lengths=(1,), rows=0))
        weights = sum(product.multiply_adds for product in of_token if product.weights is not None)
        norms = sum(norm.normalized_shape[0] * len(list(norm.parameters())) for norm in self._head_norms())
        biases = sum(linear.out_features for linear in self._projections() if linear.bias is not None)
        return weights + norms + biases

    def _head_norms(self) -> list[HeadLayerNorm | HeadRMSNorm]:
        return [module for module in self.core.children() if isinstance(module, HeadLayerNorm | HeadRMSNorm)]

    def _projections(self) -> list[nn.Linear]:
        return [self.core.linear_qkv, self.core.linear_proj]

    def _biases(self) -> list[Tensor]:
        return [linear.bias for linear in self._projections() if linear.bias is not None]


def attention_spec(config: ModelConfig, site: Site) -> ModuleSpec:
    query_norm, key_norm = (_head_norm(config, heads) for heads in (config.num_heads, config.query_groups))
    qkv: Any = Linear
    projection: Any = Linear
    query, key = config.num_heads * config.size_per_head, config.query_groups * config.size_per_head
    if adapted := site.adapted("attention", parts := {"q": query, "k": key, "v": key}):
        of_qkv = {"parts": parts, "groups": config.query_groups, "site": site.child("linear_qkv")}
        qkv = partial(AdaptedLinear, adapters=of_qkv | {"adapted": adapted})
    if adapted := site.adapted("attention", parts := {"o": config.hidden_size}):
        of_proj = {"parts": parts, "adapted": adapted, "site": site.child("linear_proj")}
        projection = ModuleSpec(module=AdaptedLinear, params={"adapters": of_proj})
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=qkv,
            core_attention=DocumentAttention,
            linear_proj=projection,
            q_layernorm=query_norm,
            k_layernorm=key_norm,
        ),
    )


def _head_norm(config: ModelConfig, heads: int) -> Any:
    """Return the norm of the queries or keys as megatron expects it. heads: the number of query or key heads."""
    if config.qk_norm == "rms_norm_full":
        return ModuleSpec(module=HeadRMSNorm, params={"heads": heads})
    return {"none": None, "layer_norm": HeadLayerNorm, "rms_norm": HeadRMSNorm}[config.qk_norm]


def megatron_config(config: ModelConfig) -> TransformerConfig:
    """Build the megatron configuration. It contains the settings that SelfAttention reads."""
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_query_groups=config.query_groups,
        kv_channels=config.size_per_head,
        layernorm_epsilon=config.norm_epsilon,
        add_bias_linear=config.attention_bias == "all",
        add_qkv_bias=config.attention_bias == "qkv",
        activation_func=F.silu,
        gated_linear_unit=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=config.init_std,
        cuda_graph_scope=[],  # the default raises megatron's own deprecation warning
    )
