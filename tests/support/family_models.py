"""Random small models of every Hugging Face family, as folders and as reference models.

transformers has a class for each family but DeepSeekMoE, whose reference is written here from the paper.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.hugging_face_models import SIZES

SPECIAL = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3, "pad_token_id": None},  # a pad token gets no gradient there
    "deepseek": {
        "moe_intermediate_size": 24,
        "n_routed_experts": 6,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
    },
}


def save_model(kind: str, folder: Path, **changes) -> nn.Module:
    """Write a random model of a family to a folder. Return the reference model, in float32.

    Its norms' weights and its biases are random too, so that each affects the result.
    """
    torch.manual_seed(0)
    sizes = SIZES | SPECIAL.get(kind, {}) | changes
    if "rope_parameters" in sizes:
        del sizes["rope_theta"]
    if kind == "deepseek":
        model: nn.Module = DeepSeekMoE(sizes)
    else:
        config = AutoConfig.for_model(kind, **sizes)
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", experts_implementation="eager"
        ).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name or kind == "deepseek":
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    if kind == "deepseek":
        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": kind} | sizes))
    else:
        model.save_pretrained(folder)
    return model


def reference_model(folder: Path) -> nn.Module:
    """Load a folder's model with transformers, or as the reference of this file."""
    sizes = json.loads((folder / "config.json").read_text())
    if sizes["model_type"] != "deepseek":
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager").eval()
    model = DeepSeekMoE(sizes)
    model.load_state_dict(
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    )
    return model


def linear(width_in: int, width_out: int) -> nn.Linear:
    return nn.Linear(width_in, width_out, bias=False)


class Weight(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class DeepSeekMoE(nn.Module):
    """DeepSeekMoE (arXiv 2401.06066, eq. 9-11) in naive form: one token and one expert at a time.

    As in DeepSeek's published code, norm_topk_prob has no effect if only one expert is chosen.
    """

    def __init__(self, sizes: dict):
        super().__init__()
        self.sizes = s = SimpleNamespace(**sizes)
        width = s.hidden_size
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(s.vocab_size, width)
        self.model.layers = nn.ModuleList(self._layer(number) for number in range(s.num_hidden_layers))
        self.model.norm = Weight(width)
        self.lm_head = linear(width, s.vocab_size)

    def _layer(self, number: int) -> nn.Module:
        s, layer = self.sizes, nn.Module()
        width = s.hidden_size
        size = width // s.num_attention_heads
        layer.self_attn = nn.Module()
        for key, heads in (("q", s.num_attention_heads), ("k", s.num_key_value_heads), ("v", s.num_key_value_heads)):
            layer.self_attn.add_module(f"{key}_proj", linear(width, heads * size))
        layer.self_attn.o_proj = linear(s.num_attention_heads * size, width)
        layer.input_layernorm, layer.post_attention_layernorm = Weight(width), Weight(width)
        if number < s.first_k_dense_replace or number % s.moe_layer_freq:
            layer.mlp = self._mlp(s.intermediate_size)
            return layer
        layer.mlp = nn.Module()
        layer.mlp.gate = linear(width, s.n_routed_experts)
        layer.mlp.experts = nn.ModuleList(self._mlp(s.moe_intermediate_size) for _ in range(s.n_routed_experts))
        if s.n_shared_experts:
            layer.mlp.shared_experts = self._mlp(s.n_shared_experts * s.moe_intermediate_size)
        return layer

    def _mlp(self, size: int) -> nn.Module:
        mlp, width = nn.Module(), self.sizes.hidden_size
        mlp.gate_proj, mlp.up_proj, mlp.down_proj = linear(width, size), linear(width, size), linear(size, width)
        return mlp

    def forward(self, ids: torch.Tensor) -> SimpleNamespace:
        x = self.model.embed_tokens(ids[0])
        for layer in self.model.layers:
            x = x + self._attend(layer.self_attn, self._norm(x, layer.input_layernorm))
            y = self._norm(x, layer.post_attention_layernorm)
            x = x + torch.stack([self._feed(layer.mlp, token) for token in y])
        return SimpleNamespace(logits=self.lm_head(self._norm(x, self.model.norm))[None])

    def _norm(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.sizes.rms_norm_eps) * norm.weight

    def _feed(self, mlp: nn.Module, token: torch.Tensor) -> torch.Tensor:
        if not hasattr(mlp, "experts"):
            return swiglu(mlp, token)
        scores = torch.softmax(mlp.gate(token), dim=0)
        best = scores.argsort(descending=True)[: self.sizes.num_experts_per_tok]
        total = scores[best].sum() if self.sizes.norm_topk_prob and len(best) > 1 else 1
        y = sum(scores[expert] / total * swiglu(mlp.experts[expert], token) for expert in best.tolist())
        return y + swiglu(mlp.shared_experts, token) if self.sizes.n_shared_experts else y

    def _attend(self, attention: nn.Module, x: torch.Tensor) -> torch.Tensor:
        s, length = self.sizes, len(x)
        q, k, v = (
            attention.get_submodule(f"{key}_proj")(x).view(length, -1, s.hidden_size // s.num_attention_heads)
            for key in "qkv"
        )
        q, k = self._rotate(q), self._rotate(k)
        shared = s.num_attention_heads // s.num_key_value_heads
        heads = []
        for head in range(s.num_attention_heads):
            scores = q[:, head] @ k[:, head // shared].T / q.shape[2] ** 0.5
            scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
            heads.append(scores.softmax(1) @ v[:, head // shared])
        return attention.o_proj(torch.cat(heads, dim=1))

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        half, dtype, x = x.shape[2] // 2, x.dtype, x.double()
        frequency = 1 / self.sizes.rope_theta ** (torch.arange(half) / half)
        angle = torch.outer(torch.arange(len(x)).float(), frequency).double()
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat([turned.real, turned.imag], dim=-1).to(dtype)


def swiglu(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
