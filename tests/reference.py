"""Naive oracles of routing and experts: plain loops over tokens and experts, no sorting of tensors, no dispatch.

A router's oracle returns gates_TE: the combine weight of every token at every expert, 0 where it does not go. The
gates are differentiable, so autograd through these loops is the oracle of every gradient.

Shape suffixes: T tokens, D model width, E experts, F expert width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from moe_dist.batch import MODALITIES, TokenInfo
from moe_dist.moe.expert_choice import ModalityRouter
from moe_dist.moe.router import TopKRouter

_WORD = (1 << 64) - 1


def splitmix_hash(key: int, *ids: int) -> int:
    """moe_dist.moe.random.hash_ids on Python integers: one round of SplitMix64 for each id, unsigned."""
    state = key & _WORD
    for id_ in ids:
        z = ((state ^ (id_ & _WORD)) + 0x9E3779B97F4A7C15) & _WORD
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
        state = z ^ (z >> 31)
    return state


def selection_key(logit: float, token_id: int, expert: int, key: int) -> tuple[int, int]:
    """What selection compares: the logit on a grid of 2^-14 within +-512, then 40 bits of hash."""
    position = max(-(2**23), min(2**23 - 1, round(logit * 2**14)))
    return position, splitmix_hash(key, token_id, expert) & ((1 << 40) - 1)


def groups_of(info: TokenInfo, modalities: Sequence[int]) -> list[list[int]]:
    """Valid tokens of those modalities, selection group by selection group."""
    size = info.num_tokens // info.num_groups
    return [
        [
            t
            for t in range(group * size, (group + 1) * size)
            if bool(info.valid_T[t]) and int(info.modality_T[t]) in modalities
        ]
        for group in range(info.num_groups)
    ]


def top_k_gates(
    x_TD: Tensor, weight_ED: Tensor, info: TokenInfo, groups: list[list[int]], key: int, *, k, score, renormalize
) -> Tensor:
    num_experts = weight_ED.shape[0]
    rows = [[torch.zeros((), dtype=x_TD.dtype)] * num_experts for _ in range(info.num_tokens)]
    for t in [t for group in groups for t in group]:
        logits = [(x_TD[t] * weight_ED[e]).sum() for e in range(num_experts)]
        if score == "softmax":
            total = sum(torch.exp(logit) for logit in logits)
            scores = [torch.exp(logit) / total for logit in logits]
        else:
            scores = [1 / (1 + torch.exp(-logit)) for logit in logits]
        best = sorted(
            range(num_experts),
            key=lambda e: selection_key(logits[e].item(), int(info.token_id_T[t]), e, key),
            reverse=True,
        )[:k]
        total = sum(scores[e] for e in best) if renormalize else 1
        for e in best:
            rows[t][e] = scores[e] / total
    return torch.stack([torch.stack(row) for row in rows])


def expert_choice_gates(
    x_TD: Tensor, weight_ED: Tensor, info: TokenInfo, groups: list[list[int]], key: int, *, capacity_factor
) -> Tensor:
    """MoMa (arXiv 2407.21770) eq. 1 within each group of tokens."""
    num_experts = weight_ED.shape[0]
    rows = [[torch.zeros((), dtype=x_TD.dtype)] * num_experts for _ in range(info.num_tokens)]
    for group in groups:
        capacity = min(len(group), math.ceil(Fraction(str(capacity_factor)) * len(group) / num_experts))
        for e in range(num_experts):
            logits = {t: (x_TD[t] * weight_ED[e]).sum() for t in group}
            best = sorted(
                group,
                key=lambda t: selection_key(logits[t].item(), int(info.token_id_T[t]), e, key),
                reverse=True,
            )[:capacity]
            for t in best:
                rows[t][e] = 1 / (1 + torch.exp(-logits[t]))
    return torch.stack([torch.stack(row) for row in rows])


def gates(router, x_TD: Tensor, weights_ED: Sequence[Tensor], info: TokenInfo, modality: int | None = None) -> Tensor:
    """The oracle of any of our routers; weights_ED: its gates' weights (a copy), in the order of its parameters."""
    if isinstance(router, ModalityRouter):
        children = zip(MODALITIES, weights_ED)
        columns = [gates(getattr(router, name), x_TD, [w], info, m) for m, (name, w) in enumerate(children)]
        return torch.cat(columns, dim=1)
    settings = router.settings
    groups = groups_of(info, range(len(MODALITIES)) if modality is None else [modality])
    arguments = (x_TD, weights_ED[0], info, groups, router.key)
    if isinstance(router, TopKRouter):
        return top_k_gates(*arguments, k=settings.top_k, score=settings.score, renormalize=settings.renormalize)
    return expert_choice_gates(*arguments, capacity_factor=settings.capacity_factor)


def expert_layer(x_TD: Tensor, gates_TE: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor) -> Tensor:
    """y_t = sum_e g_te SwiGLU_e(x_t), every expert on every token."""
    width = down_EFD.shape[1]
    outputs = []
    for t in range(x_TD.shape[0]):
        y_D = torch.zeros_like(x_TD[t])
        for e in range(gates_TE.shape[1]):
            hidden = x_TD[t] @ gate_up_EDF[e]
            gate, up = hidden[:width], hidden[width:]
            y_D = y_D + gates_TE[t, e] * ((gate / (1 + torch.exp(-gate)) * up) @ down_EFD[e])
        outputs.append(y_D)
    return torch.stack(outputs)
