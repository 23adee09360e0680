"""Small expert layers and awkward micro-batches, and their comparison with the oracles.

Shape suffixes: T tokens, D model width, E experts, F expert width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.config.model_section import MoEFFN
from moe_dist.core.batch import IMAGE, TEXT, TokenInfo
from moe_dist.model.moe.moe_layer import MoELayer, build_moe_layer
from moe_dist.model.site import Site
from moe_dist.parallel.layout import Layout
from tests.support import routing_reference as reference

TOKENS, GROUPS, WIDTH, EXPERT_WIDTH = 24, 2, 16, 8

ROUTERS: dict[str, dict[str, Any]] = {
    "top_1": {"type": "top_k", "num_experts": 8, "top_k": 1},
    "top_2_sigmoid": {"type": "top_k", "num_experts": 8, "top_k": 2, "score": "sigmoid", "renormalize": True},
    "top_8": {"type": "top_k", "num_experts": 8, "top_k": 8, "renormalize": True},
    "biased": {"type": "top_k", "num_experts": 8, "top_k": 1, "bias": True, "weighting": "straight_through"},
    "by_position": {"type": "top_k", "num_experts": 8, "top_k": 2, "capacity_factor": 0.8},
    "by_probability": {
        "type": "top_k",
        "num_experts": 8,
        "top_k": 2,
        "capacity_factor": 0.8,
        "drop_policy": "probability",
    },
    "padded": {"type": "top_k", "num_experts": 8, "top_k": 2, "capacity_factor": 1.2, "pad_to_capacity": True},
    "null": {"type": "null_experts", "num_experts": 8, "num_null_experts": 8, "top_k": 3},
    "null_of_true": {
        "type": "null_experts",
        "num_experts": 8,
        "num_null_experts": 8,
        "top_k": 3,
        "normalize_over": "all_true",
    },
    "null_of_chosen": {
        "type": "null_experts",
        "num_experts": 8,
        "num_null_experts": 4,
        "top_k": 3,
        "normalize_over": "chosen",
    },
    "null_full": {
        "type": "null_experts",
        "num_experts": 8,
        "num_null_experts": 4,
        "top_k": 4,
        "capacity_factor": 0.6,
        "drop_policy": "probability",
    },
    "deepseek": {
        "type": "deepseek_v3",
        "num_experts": 8,
        "top_k": 3,
        "groups": 4,
        "top_groups": 2,
        "scale": 2.5,
    },
    "deepseek_ungrouped": {"type": "deepseek_v3", "num_experts": 8, "top_k": 2},
    "deepseek_in_text": {
        "type": "modality",
        "text": {"type": "deepseek_v3", "num_experts": 4, "top_k": 2, "groups": 2, "top_groups": 1},
        "image": {"type": "expert_choice", "num_experts": 4},
    },
    "moe_8x": {"type": "expert_choice", "num_experts": 8},
    "4t4i": {
        "type": "modality",
        "text": {"type": "expert_choice", "num_experts": 4},
        "image": {"type": "expert_choice", "num_experts": 4, "capacity_factor": 1.5},
    },
    "7t1i": {
        "type": "modality",
        "text": {"type": "expert_choice", "num_experts": 7},
        "image": {"type": "expert_choice", "num_experts": 1},
    },
    "noisy": {
        "type": "modality",
        "text": {"type": "expert_choice", "num_experts": 4, "gumbel_noise": True},
        "image": {"type": "expert_choice", "num_experts": 4},
    },
    "6t2i": {
        "type": "modality",
        "text": {"type": "top_k", "num_experts": 6, "top_k": 2},
        "image": {"type": "expert_choice", "num_experts": 2},
    },
    "null_in_text": {
        "type": "modality",
        "text": {"type": "null_experts", "num_experts": 4, "num_null_experts": 3, "top_k": 2},
        "image": {"type": "top_k", "num_experts": 4, "top_k": 2, "capacity_factor": 0.7, "pad_to_capacity": True},
    },
}

BATCHES = ("mixed", "one_sided", "rank_0_padding", "no_images", "one_token", "skewed", "repeated")


def make_info(modality_T: Tensor, valid_T: Tensor, first_id: int = 0, num_groups: int = GROUPS) -> TokenInfo:
    num_tokens = modality_T.numel()
    return TokenInfo.build(
        modality_T=modality_T,
        valid_T=valid_T,
        position_T=torch.arange(num_tokens),
        token_id_T=torch.arange(num_tokens) + first_id,
        document_lengths=[num_tokens],
        num_groups=num_groups,
    )


def make_batch(kind: str, rank: int) -> tuple[Tensor, TokenInfo, Tensor]:
    """Return x_TD (float64, a leaf), its TokenInfo, and the coefficients c of a loss sum(y * c), for one rank."""
    generator = torch.Generator().manual_seed(100 + rank)
    x_TD = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    loss_TD = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    image_share = 0.3 + 0.4 * (rank % 2)
    modality_T = (torch.rand(TOKENS, generator=generator) < image_share).long()
    valid_T = torch.rand(TOKENS, generator=generator) < 0.8
    if kind == "one_sided":  # even ranks have only text, odd ranks only images
        modality_T = torch.full_like(modality_T, IMAGE if rank % 2 else TEXT)
    elif kind == "no_images":
        modality_T = torch.zeros_like(modality_T)
    elif kind == "rank_0_padding" and rank == 0:
        valid_T = torch.zeros_like(valid_T)
    elif kind == "one_token":  # one token over all ranks: on rank 0, in its second group
        valid_T = (torch.arange(TOKENS) == TOKENS - 3) & (rank == 0)
    elif kind == "skewed":
        x_TD = x_TD.abs()
    elif kind == "repeated":  # three kinds of tokens tie; for the third, zero, all experts tie too
        x_TD = torch.cat([x_TD[:2], torch.zeros_like(x_TD[:1])])[torch.arange(TOKENS) % 3]
    return x_TD.requires_grad_(), make_info(modality_T, valid_T, first_id=rank * TOKENS), loss_TD


def make_layer(router: str, kind: str = "mixed", layout: Layout | None = None, slices: int = 1) -> MoELayer:
    """Build a float64 layer. If `kind` is "skewed", every gate sends positive inputs to its expert 0."""
    ffn = MoEFFN(type="moe", hidden_size=EXPERT_WIDTH * slices, slices=slices, router=ROUTERS[router])
    site = Site(hidden_size=WIDTH, layer=3, seed=5, init_std=0.3, output_std=0.2, name="layers.3.ffn")
    layer = build_moe_layer(ffn, site, layout or Layout()).double()
    for name, parameter in layer.router.named_parameters():
        if name.endswith("bias"):  # biases start at zero, where an error would not be noticed
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(2))
    for buffer in layer.router.buffers():  # so does the bias of DeepSeek-V3's router
        nn.init.normal_(buffer, std=0.3, generator=torch.Generator().manual_seed(3))
    if kind == "skewed":
        with torch.no_grad():
            for name, parameter in layer.router.named_parameters():
                if name.endswith("weight"):
                    parameter.abs_().mul_(-1)[0].mul_(-1)
    return layer


def run_layer(layer: MoELayer, kind: str, rank: int) -> dict[str, Any]:
    """Run forward and backward of one rank's micro-batch and return everything that the oracle predicts."""
    x_TD, info, loss_TD = make_batch(kind, rank)
    y_TD, _ = layer(x_TD, info)
    (y_TD * loss_TD).sum().backward()
    return {
        "y": y_TD.detach(),
        "x_grad": x_TD.grad,
        "gate_grads": [weight.grad for weight in layer.router.parameters()],
        "expert_ids": layer.experts.expert_ids,
        "gate_up_grad": layer.experts.gate_up.grad,
        "down_grad": layer.experts.down.grad,
    }


def oracle(
    router: str, kind: str, world: int, slices: int = 1
) -> tuple[list[dict[str, Tensor]], dict[str, list[Tensor]]]:
    """Return per-rank outputs and input gradients, and the weights' gradients summed over ranks, from the dense loops.

    The loops use whole experts, joined from their slices; the gradients are those of the slices.
    """
    layer = make_layer(router, kind, slices=slices)
    gate_weights = [weight.detach().clone().requires_grad_() for weight in layer.router.parameters()]
    gate_up, down = (p.detach().clone().requires_grad_() for p in (layer.experts.gate_up, layer.experts.down))
    ranks = []
    for rank in range(world):
        x_TD, info, loss_TD = make_batch(kind, rank)
        gates_TE = reference.gates(layer.router, x_TD, gate_weights, info)
        y_TD = reference.expert_layer(x_TD, gates_TE, *reference.join_slices(gate_up, down, slices))
        (y_TD * loss_TD).sum().backward()
        ranks.append({"y": y_TD.detach(), "x_grad": x_TD.grad, "gates": gates_TE.detach()})
    gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in (*gate_weights, gate_up, down)]
    return ranks, {"gates": gradients[:-2], "gate_up": [*gradients[-2]], "down": [*gradients[-1]]}


def assert_equals_oracle(results: list[dict[str, Any]], router: str, kind: str, slices: int = 1) -> None:
    """Compare every rank's run_layer with the oracle, to 1e-9 relative to the largest value of the same tensor."""
    ranks, weights = oracle(router, kind, len(results), slices)
    for got, expected in zip(results, ranks):
        close(got["y"], expected["y"], "y")
        close(got["x_grad"], expected["x_grad"], "gradient of x")
    for index, expected in enumerate(weights["gates"]):
        close(sum(got["gate_grads"][index] for got in results), expected, f"gradient of gate {index}")
    for key in ("gate_up", "down"):
        for expert, expected in enumerate(weights[key]):
            holders = [got for got in results if expert in got["expert_ids"]]
            total = sum(got[f"{key}_grad"][got["expert_ids"].index(expert)] for got in holders)
            close(total, expected, f"gradient of {key} of expert {expert}")


def close(got: Tensor, expected: Tensor, what: str) -> None:
    error = float((got - expected).detach().abs().max())
    scale = max(1.0, float(expected.detach().abs().max()))
    assert error <= 1e-9 * scale, f"{what}: off by {error:.3e}"
