"""Naive oracles of routing and experts: plain loops over tokens and experts, no sorting of tensors, no dispatch.

A router's oracle returns gates_TE: the combine weight of every token at every expert, 0 if the token does not go there.
The gates are differentiable, so autograd through these loops is the oracle of every gradient.

Shape suffixes: T tokens, D model width, E experts, F expert width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from moe_dist.core.batch import MODALITIES, TokenInfo
from moe_dist.model.moe.deepseek_router import DeepSeekV3Router
from moe_dist.model.moe.expert_choice import ModalityRouter
from moe_dist.model.moe.token_choice import TokenChoiceRouter

_WORD = (1 << 64) - 1
LORA_ALPHA = 12.0  # alpha of every LoRA that is compared with an oracle


def splitmix_hash(key: int, *ids: int) -> int:
    """Compute moe_dist.core.seeding.hash_ids on Python integers: one round of SplitMix64 for each id, unsigned."""
    state = key & _WORD
    for id_ in ids:
        z = ((state ^ (id_ & _WORD)) + 0x9E3779B97F4A7C15) & _WORD
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
        state = z ^ (z >> 31)
    return state


def selection_key(logit: float, token_id: int, expert: int, key: int) -> tuple[int, int]:
    """Return the key that selection compares: the logit on a grid of 2^-14 within +-256, then the 40 high bits, signed,
    of a hash.
    """
    position = max(-(2**22), min(2**22 - 1, round(logit * 2**14)))
    word = (splitmix_hash(0, token_id) ^ expert * 0x9E3779B97F4B) * (key | 1) & _WORD
    return position, (word - (word >> 63 << 64)) >> 24


def groups_of(info: TokenInfo, modalities: Sequence[int]) -> list[list[int]]:
    """Return the valid tokens of these modalities, selection group by selection group."""
    size = info.num_tokens // info.num_groups
    return [
        [
            t
            for t in range(group * size, (group + 1) * size)
            if bool(info.valid_T[t]) and int(info.modality_T[t]) in modalities
        ]
        for group in range(info.num_groups)
    ]


@dataclass
class Decision:
    """A routing decision: gates_TE, and the assignments as sets: (token, column) chosen, (token, expert) kept."""

    gates_TE: Tensor
    chosen: set[tuple[int, int]]
    kept: set[tuple[int, int]]


def token_choice(
    x_TD: Tensor, weight_CD: Tensor, bias_C: Tensor | None, info: TokenInfo, groups: list[list[int]], key: int, settings
) -> Decision:
    """Route as TopKRouter and NullExpertRouter do (AdaMoE, arXiv 2406.13233), with capacity."""
    columns, experts, k = weight_CD.shape[0], settings.num_experts, settings.top_k
    rows = [[torch.zeros((), dtype=x_TD.dtype)] * experts for _ in range(info.num_tokens)]
    chosen, kept = set(), set()
    for group in groups:
        values, weights = {}, {}
        for t in group:
            logits = [(x_TD[t] * weight_CD[c]).sum() + (0 if bias_C is None else bias_C[c]) for c in range(columns)]
            token = int(info.token_id_T[t])
            ranked = sorted(range(columns), key=lambda c: selection_key(logits[c].item(), token, c, key), reverse=True)
            best = ranked[:k]
            chosen |= {(t, c) for c in best}
            values[t], weights[t] = _token_choice_weights(logits, best, experts, settings)
        for e in range(experts):
            mine = [t for t in group if (t, e) in chosen]
            if settings.capacity_factor is not None:
                capacity = math.ceil(Fraction(str(settings.capacity_factor)) * len(group) * k / columns)
                gate = {t: selection_key(values[t][e].item(), int(info.token_id_T[t]), e, key) for t in mine}
                position = settings.drop_policy == "position"
                mine = sorted(mine) if position else sorted(mine, key=gate.__getitem__, reverse=True)
                mine = mine[:capacity]
            for t in mine:
                kept.add((t, e))
                rows[t][e] = weights[t][e]
    return Decision(torch.stack([torch.stack(row) for row in rows]), chosen, kept)


def _token_choice_weights(logits: list[Tensor], best: list[int], experts: int, settings):
    """Return the gate values of all columns, and the combine weight of each chosen true expert."""
    total = sum(torch.exp(logit) for logit in logits)
    if getattr(settings, "score", "softmax") == "softmax":
        values = [torch.exp(logit) / total for logit in logits]
    else:
        values = [1 / (1 + torch.exp(-logit)) for logit in logits]
    true = [c for c in best if c < experts]
    if settings.type == "null_experts":
        columns = {"chosen_true": true, "all_true": range(experts), "chosen": best}[settings.normalize_over]
        total = sum(torch.exp(logits[c]) for c in columns)
        return values, {c: torch.exp(logits[c]) / total for c in true}
    if settings.weighting == "straight_through":
        return values, {c: values[c] / values[c].detach() for c in true}
    total = sum(values[c] for c in true) if settings.renormalize else 1
    return values, {c: values[c] / total for c in true}


def gumbel_difference(key: int, token_id: int, expert: int) -> float:
    """Return G' - G'', which is logistic: the logit of a uniform number, here of 40 bits of a hash."""
    u = ((splitmix_hash(key, token_id, expert) >> 24) + 0.5) / 2**40
    return math.log(u / (1 - u))


def expert_choice_gates(
    x_TD: Tensor,
    weight_ED: Tensor,
    info: TokenInfo,
    groups: list[list[int]],
    key: int,
    *,
    capacity_factor,
    noise_key: int | None = None,
) -> Tensor:
    """Compute MoMa's eq. 1 (arXiv 2407.21770) within each group of tokens. noise_key: with Gumbel noise on the gate."""
    num_experts = weight_ED.shape[0]
    rows = [[torch.zeros((), dtype=x_TD.dtype)] * num_experts for _ in range(info.num_tokens)]
    for group in groups:
        capacity = min(len(group), math.ceil(Fraction(str(capacity_factor)) * len(group) / num_experts))
        for e in range(num_experts):
            logits = {t: (x_TD[t] * weight_ED[e]).sum() for t in group}
            if noise_key is not None:
                logits = {t: x + gumbel_difference(noise_key, int(info.token_id_T[t]), e) for t, x in logits.items()}
            best = sorted(
                group,
                key=lambda t: selection_key(logits[t].item(), int(info.token_id_T[t]), e, key),
                reverse=True,
            )[:capacity]
            for t in best:
                rows[t][e] = 1 / (1 + torch.exp(-logits[t]))
    return torch.stack([torch.stack(row) for row in rows])


def deepseek_v3(
    x_TD: Tensor, weight_ED: Tensor, bias_E: Sequence[float], info: TokenInfo, groups: list[list[int]], keys, settings
) -> Decision:
    """DeepSeekV3Router (arXiv 2412.19437, eq. 12-16). keys: of the experts' ties and of the groups'."""
    experts, k, size = len(weight_ED), settings.top_k, len(weight_ED) // settings.groups
    rows = [[torch.zeros((), dtype=x_TD.dtype)] * experts for _ in range(info.num_tokens)]
    chosen = set()
    for t in (t for group in groups for t in group):
        token = int(info.token_id_T[t])
        scores = [1 / (1 + torch.exp(-(x_TD[t] * weight_ED[e]).sum())) for e in range(experts)]
        biased = [scores[e].item() + bias_E[e] for e in range(experts)]
        members = [range(g * size, (g + 1) * size) for g in range(settings.groups)]
        sums = [sum(sorted((biased[e] for e in of_group), reverse=True)[:2]) for of_group in members]
        best_groups = sorted(
            range(settings.groups), key=lambda g: selection_key(sums[g], token, g, keys[1]), reverse=True
        )[: settings.top_groups]
        candidates = [e for g in best_groups for e in members[g]]
        best = sorted(candidates, key=lambda e: selection_key(biased[e], token, e, keys[0]), reverse=True)[:k]
        total = sum(scores[e] for e in best)
        for e in best:
            chosen.add((t, e))
            rows[t][e] = settings.scale * scores[e] / total
    return Decision(torch.stack([torch.stack(row) for row in rows]), chosen, chosen)


def bias_after(bias_E: Sequence[float], load_E: Sequence[int], rate: float) -> list[float]:
    """DeepSeek-V3's bias after a step: up where the load is below the mean, down where it is above."""
    mean = Fraction(sum(load_E), len(load_E))
    return [b + rate * (1 if load < mean else -1 if load > mean else 0) for b, load in zip(bias_E, load_E, strict=True)]


def decide(router, x_TD: Tensor, weights: Sequence[Tensor], info: TokenInfo, modality: int | None = None) -> Decision:
    """Apply the oracle of a token-choice router. weights: copies of its gate's weight and, if it has one, bias."""
    groups = groups_of(info, range(len(MODALITIES)) if modality is None else [modality])
    if isinstance(router, DeepSeekV3Router):
        keys = (router.key, router.group_key)
        return deepseek_v3(x_TD, weights[0], router.bias.value.tolist(), info, groups, keys, router.settings)
    bias_C = weights[1] if router.settings.bias else None
    return token_choice(x_TD, weights[0], bias_C, info, groups, router.key, router.settings)


def gates(router, x_TD: Tensor, weights: Sequence[Tensor], info: TokenInfo, modality: int | None = None) -> Tensor:
    """Apply the oracle of any of our routers. weights: copies of its gates' parameters, in the
    order of its parameters.
    """
    if isinstance(router, ModalityRouter):
        left, columns = list(weights), []
        for index, name in enumerate(MODALITIES):
            child = getattr(router, name)
            mine, left = left[: len(list(child.parameters()))], left[len(list(child.parameters())) :]
            columns.append(gates(child, x_TD, mine, info, index))
        return torch.cat(columns, dim=1)
    if isinstance(router, TokenChoiceRouter):
        return decide(router, x_TD, weights, info, modality).gates_TE
    groups = groups_of(info, range(len(MODALITIES)) if modality is None else [modality])
    factor = router.settings.capacity_factor
    noise_key = router.noise_key if router.settings.gumbel_noise and router.training else None
    return expert_choice_gates(x_TD, weights[0], info, groups, router.key, capacity_factor=factor, noise_key=noise_key)


def admitted(logits_T: Sequence[float], info: TokenInfo, sets: list[list[int]], key: int, capacity: float) -> set[int]:
    """Return the tokens of each competing set that a block with mixture-of-depths admits, ceil(b c) of them."""
    chosen = set()
    for members in sets:

        def rank(t: int) -> tuple[int, int]:
            return selection_key(logits_T[t], int(info.token_id_T[t]), 0, key)

        chosen |= set(sorted(members, key=rank, reverse=True)[: math.ceil(Fraction(str(capacity)) * len(members))])
    return chosen


def expert_layer(x_TD: Tensor, gates_TE: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor) -> Tensor:
    """Return y_t = sum_e g_te SwiGLU_e(x_t), computing every expert on every token."""
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


def join_slices(gate_up_SDF: Tensor, down_SFD: Tensor, slices: int) -> tuple[Tensor, Tensor]:
    """Join the slices of each expert side by side. Slice k of expert e of E experts is row k E + e."""
    experts, width = len(down_SFD) // slices, down_SFD.shape[1]
    gate_up, down = [], []
    for e in range(experts):
        rows = [k * experts + e for k in range(slices)]
        gates, ups = [gate_up_SDF[row][:, :width] for row in rows], [gate_up_SDF[row][:, width:] for row in rows]
        gate_up.append(torch.cat([*gates, *ups], dim=1))
        down.append(torch.cat([down_SFD[row] for row in rows]))
    return torch.stack(gate_up), torch.stack(down)


def dropped(x_D: Tensor, key: int, token_id: int, rate: float) -> Tensor:
    """Apply dropout to one token: a column is zero if 16 bits of its hash are below the rate times 2^16."""
    limit = round(rate * 2**16)
    bits = [splitmix_hash(key, token_id, column // 4) >> 16 * (column % 4) & 0xFFFF for column in range(len(x_D))]
    keep_D = torch.tensor([0.0 if value < limit else 1 / (1 - limit / 2**16) for value in bits], dtype=x_D.dtype)
    return x_D * keep_D


def lora_layer(x_TD: Tensor, gates_TE: Tensor, info: TokenInfo, experts, weights: dict[str, Tensor]) -> Tensor:
    """Compute LLaVA-MoLE (arXiv 2401.16160) token by token. weights: copies of the layer's parameters, by name.

    The expert of a token is the one with a nonzero gate, and its gate scales the deltas. A token without one (padding)
    gets zero.
    """

    def delta(part: str, x_D: Tensor, t: int, e: int) -> Tensor:
        settings = experts.lora[part]
        x_D = dropped(x_D, settings.key, int(info.token_id_T[t]), settings.rate) if settings.rate else x_D
        a_eDr, b_erF = weights[f"experts.lora.{part}.a"], weights[f"experts.lora.{part}.b"]
        return gates_TE[t, e] * LORA_ALPHA / a_eDr.shape[2] * ((x_D @ a_eDr[e]) @ b_erF[e])

    gate_up_FD, down_DF = weights["experts.base.gate_up.weight"], weights["experts.base.down.weight"]
    gate_FD, up_FD = gate_up_FD[: down_DF.shape[1]], gate_up_FD[down_DF.shape[1] :]
    outputs = []
    for t in range(x_TD.shape[0]):
        y_D = 0 * x_TD[t]
        for e in gates_TE[t].nonzero().flatten().tolist():
            gate_F = gate_FD @ x_TD[t] + delta("gate", x_TD[t], t, e)
            up_F = up_FD @ x_TD[t] + delta("up", x_TD[t], t, e)
            h_F = gate_F / (1 + torch.exp(-gate_F)) * up_F
            y_D = y_D + down_DF @ h_F + delta("down", h_F, t, e)
        outputs.append(y_D)
    return torch.stack(outputs)
