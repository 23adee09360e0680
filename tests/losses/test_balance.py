"""Load balance, pooled balance and router z-loss against plain loops over tokens and columns, gradients included.

Shape suffixes: T tokens, D model width, C columns of a router (its experts, then its null experts).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from moe_dist.config.losses import (
    LoadBalanceSettings,
    PooledBalanceSettings,
    RouterZSettings,
    TermSettings,
    loss_settings,
)
from moe_dist.core.batch import MODALITIES, Batch, TokenInfo
from moe_dist.core.errors import UserError
from moe_dist.core.routing_plan import Routing, RoutingPlan, RoutingRecord
from moe_dist.core.strict import validate
from moe_dist.losses.loss_registry import LOSSES
from moe_dist.losses.objective import make_objective
from moe_dist.losses.term import Context
from moe_dist.model.moe.expert_choice import ModalityRouter
from moe_dist.parallel.layout import Layout, make_layout
from tests.support import routing_reference as reference
from tests.support.distributed import run_ranks
from tests.support.moe_cases import GROUPS, TOKENS, WIDTH, close, make_layer

SEQUENCES = 2  # of a group
DOCUMENTS = (5, 7, 9, 3)
ONE_PROCESS = Context(layout=Layout(), group_sequences=SEQUENCES)
TOKEN_CHOICE = ("top_1", "top_2_sigmoid", "biased", "by_position", "null", "null_full", "null_in_text")


@dataclass
class Output:
    records: tuple[RoutingRecord, ...]
    logits_TV: Tensor | None = None


@dataclass
class Part:
    """What the oracles read of one router in one layer."""

    logits: dict[int, Tensor]  # by token, [C]
    values: dict[int, Tensor]  # gate values that sum to 1
    chosen: set[tuple[int, int]]
    num_experts: int


def make_batch(valid_T: Tensor | None = None) -> Batch:
    generator = torch.Generator().manual_seed(8)
    modality_T = (torch.rand(TOKENS, generator=generator) < 0.5).long()
    if valid_T is None:
        valid_T = torch.rand(TOKENS, generator=generator) < 0.8
        valid_T[:6] = False  # a whole sequence, and the first document
    index_T = torch.arange(TOKENS)
    info = TokenInfo.build(
        modality_T=modality_T,
        valid_T=valid_T,
        position_T=index_T,
        token_id_T=index_T,
        document_lengths=DOCUMENTS,
        num_groups=GROUPS,
    )
    return Batch(tokens_T=index_T, targets_T=index_T, loss_mask_T=valid_T, target_modality_T=modality_T, info=info)


def parts_of(router, x_TD: Tensor, weights: list[Tensor], info: TokenInfo, modality: int | None = None) -> list[Part]:
    if isinstance(router, ModalityRouter):
        count = len(list(router.text.parameters()))
        text, image = (getattr(router, name) for name in MODALITIES)
        return parts_of(text, x_TD, weights[:count], info, 0) + parts_of(image, x_TD, weights[count:], info, 1)
    groups = reference.groups_of(info, range(len(MODALITIES)) if modality is None else [modality])
    logits = {
        t: torch.stack([(x_TD[t] * row_D).sum() for row_D in weights[0]]) + (weights[1] if len(weights) > 1 else 0)
        for group in groups
        for t in group
    }
    sigmoid = getattr(router.settings, "score", "softmax") == "sigmoid"
    gates = {t: 1 / (1 + (-z).exp()) if sigmoid else z.exp() / z.exp().sum() for t, z in logits.items()}
    values = {t: gate / gate.sum() for t, gate in gates.items()}
    chosen = reference.decide(router, x_TD.detach(), [w.detach() for w in weights], info, modality).chosen
    return [Part(logits, values, chosen, router.num_experts)]


def balance(part: Part, tokens: list[int], pooled_nulls: bool = True) -> tuple[Tensor, int]:
    """sum_c f_c P_c over these tokens, and the number of columns."""
    columns = len(next(iter(part.logits.values())))
    mine = [t for t in tokens if t in part.logits]
    share = [sum((t, c) in part.chosen for t in mine) / max(len(mine), 1) for c in range(columns)]
    nulls = share[part.num_experts :]
    if nulls and pooled_nulls:
        share[part.num_experts :] = [sum(nulls) / len(nulls)] * len(nulls)
    means = [sum(part.values[t][c] for t in mine) / max(len(mine), 1) for c in range(columns)]
    return sum((f * p for f, p in zip(share, means)), torch.zeros((), dtype=torch.float64)), columns


def naive_load_balance(scope: str) -> Callable[[list[list[Part]], Batch], Tensor]:
    def oracle(layers: list[list[Part]], batch: Batch) -> Tensor:
        size = TOKENS // {"group": GROUPS, "sequence": GROUPS * SEQUENCES, "global": 1}[scope]
        sets = [list(range(start, start + size)) for start in range(0, TOKENS, size)]
        sets = [tokens for tokens in sets if any(bool(batch.info.valid_T[t]) for t in tokens)]
        total = torch.zeros((), dtype=torch.float64)
        for parts in layers:
            for part in parts:
                for tokens in sets:
                    value, columns = balance(part, tokens)
                    total = total + columns * value
        return total / len(layers) / len(sets)

    return oracle


def naive_pooled_balance(layers: list[list[Part]], batch: Batch) -> Tensor:
    """A layer's tokens of a document become tokens of one large router."""
    ends = [sum(DOCUMENTS[: i + 1]) for i in range(len(DOCUMENTS))]
    documents = [range(end - length, end) for end, length in zip(ends, DOCUMENTS)]
    documents = [document for document in documents if any(bool(batch.info.valid_T[t]) for t in document)]
    total = torch.zeros((), dtype=torch.float64)
    for document in documents:
        for parts in zip(*layers):
            pooled = Part({}, {}, set(), parts[0].num_experts)
            for i, part in enumerate(parts):
                pooled.logits |= {t + i * TOKENS: z for t, z in part.logits.items()}
                pooled.values |= {t + i * TOKENS: v for t, v in part.values.items()}
                pooled.chosen |= {(t + i * TOKENS, c) for t, c in part.chosen}
            tokens = [t + i * TOKENS for t in document for i in range(len(parts))]
            total = total + balance(pooled, tokens, pooled_nulls=False)[0]
    return total / len(documents)


def naive_router_z(layers: list[list[Part]], batch: Batch) -> Tensor:
    squares = [z.exp().sum().log() ** 2 for parts in layers for part in parts for z in part.logits.values()]
    return sum(squares) / len(layers) / int(batch.info.valid_T.sum())


TERMS = {
    "group": (LoadBalanceSettings, {"scope": "group"}, naive_load_balance("group")),
    "sequence": (LoadBalanceSettings, {"scope": "sequence"}, naive_load_balance("sequence")),
    "global": (LoadBalanceSettings, {"scope": "global"}, naive_load_balance("global")),
    "pooled": (PooledBalanceSettings, {}, naive_pooled_balance),
    "z": (RouterZSettings, {}, naive_router_z),
}


def make_term(name: str, context: Context = ONE_PROCESS):
    kind, settings, _ = TERMS[name]
    return LOSSES[kind](validate(kind, {"weight": 1.0, **settings}, "test"), context)


@pytest.mark.parametrize("router", TOKEN_CHOICE)
@pytest.mark.parametrize("term", TERMS)
def test_a_term_and_its_gradients_equal_the_oracle(term, router):
    batch = make_batch()
    layers = [make_layer(router), make_layer(router)]
    x_TD = torch.randn(TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
    inputs = [x_TD, x_TD.flip(1) * 0.5]
    records = tuple(layer(x, batch.info)[1] for layer, x in zip(layers, inputs))
    loss = make_term(term)
    (count,) = loss.counts(batch)
    value = loss(Output(records), batch)[0] / count
    value.backward()
    copy_TD = x_TD.detach().clone().requires_grad_()
    weights = [[p.detach().clone().requires_grad_() for p in layer.router.parameters()] for layer in layers]
    parts = [
        parts_of(layer.router, x, w, batch.info)
        for layer, x, w in zip(layers, [copy_TD, copy_TD.flip(1) * 0.5], weights)
    ]
    expected = TERMS[term][2](parts, batch)
    expected.backward()
    close(value, expected, "the value")
    close(x_TD.grad, copy_TD.grad, "gradient of x")
    for layer, copies in zip(layers, weights):
        for (name, parameter), copy in zip(layer.router.named_parameters(), copies):
            close(parameter.grad, copy.grad, f"gradient of {name}")
            assert copy.grad.any(), "nothing was compared"


def routing_of(logits_TC: Tensor, token_V: Tensor, *, k: int, nulls: int = 0) -> Output:
    """One layer's record of these logits (float64 [T, C]), top-k chosen."""
    logits_VC = logits_TC.index_select(0, token_V)
    chosen_VC = torch.zeros_like(logits_VC, dtype=torch.bool).scatter(1, logits_VC.topk(k).indices, True)
    routing = Routing(
        token_V=token_V,
        logits_VC=logits_VC,
        probs_VC=logits_VC.softmax(1),
        chosen_VC=chosen_VC,
        kept_VE=chosen_VC[:, : logits_VC.shape[1] - nulls],
    )
    plan = RoutingPlan(token_ids_N=token_V[:0], weights_N=logits_VC[:0, 0], counts_E=token_V.new_zeros(1))
    return Output((RoutingRecord(layer=0, plan=plan, routings=(routing,)),))


def test_the_value_at_balance_is_k_whatever_the_number_of_columns():
    everyone = make_batch(torch.ones(TOKENS, dtype=torch.bool))
    for columns, k in ((4, 1), (8, 2), (12, 3)):
        logits_TC = torch.zeros(TOKENS, columns, dtype=torch.float64)
        for t in range(TOKENS):
            logits_TC[t, [(t + i) % columns for i in range(k)]] = 1e-9
        output = routing_of(logits_TC, torch.arange(TOKENS), k=k)
        term = make_term("global")
        assert term(output, everyone)[0].item() / term.counts(everyone)[0] == pytest.approx(k)


def test_nulls_are_balanced_as_one_pool():
    """All tokens on one null, or spread over the nulls: the same loss, and the same gradient for every null."""
    everyone = make_batch(torch.ones(TOKENS, dtype=torch.bool))
    losses = []
    for nulls in ([4, 4, 4, 4], [4, 5, 6, 7]):
        logits_TC = torch.zeros(TOKENS, 8, dtype=torch.float64)
        for t in range(TOKENS):
            logits_TC[t, nulls[t % 4]] = 1e-9
            logits_TC[t, t % 4] = 1e-9
        logits_TC.requires_grad_()
        term = make_term("global")
        loss = term(routing_of(logits_TC, torch.arange(TOKENS), k=2, nulls=4), everyone)[0]
        loss.backward()
        null_gradients = logits_TC.grad[:, 4:]
        assert float((null_gradients - null_gradients[:, :1]).abs().max()) < 1e-9
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("term", TERMS)
def test_padding_does_not_count(term):
    """Rows of padding change neither value nor count, whatever their logits."""
    batch = make_batch()
    token_V = batch.info.valid_T.nonzero().squeeze(1)
    logits_TC = torch.randn(TOKENS, 6, dtype=torch.float64)
    loud_TC = logits_TC.masked_fill(~batch.info.valid_T[:, None], 1e6)
    values = [make_term(term)(routing_of(logits, token_V, k=2), batch)[0] for logits in (logits_TC, loud_TC)]
    assert values[0] == values[1]
    if term == "global":
        assert make_term(term).counts(batch) == (len(token_V),)


@pytest.mark.parametrize("term", TERMS)
def test_the_scale_does_not_change_with_the_sequence_length(term):
    """Every token twice, in sequences twice as long."""
    short = make_batch(torch.ones(TOKENS, dtype=torch.bool))
    twice_T = torch.arange(TOKENS).repeat_interleave(2)
    info = TokenInfo.build(
        modality_T=short.info.modality_T[twice_T],
        valid_T=short.info.valid_T[twice_T],
        position_T=torch.arange(2 * TOKENS),
        token_id_T=torch.arange(2 * TOKENS),
        document_lengths=[2 * length for length in DOCUMENTS],
        num_groups=GROUPS,
    )
    long = replace(short, info=info)
    logits_TC = torch.randn(TOKENS, 6, dtype=torch.float64)
    values = []
    for batch, logits in ((short, logits_TC), (long, logits_TC[twice_T])):
        loss = make_term(term)
        output = routing_of(logits, torch.arange(batch.info.num_tokens), k=2)
        values.append(loss(output, batch)[0].item() / loss.counts(batch)[0])
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def logits_of(rank: int, micro: int) -> Tensor:
    return torch.randn(TOKENS, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * rank + micro))


def valid_on(rank: int) -> Tensor:
    return torch.arange(TOKENS) >= 7 * rank


def global_balance(rank: int) -> tuple[float, list[Tensor]]:
    """A step of two micro-batches on this rank: its part of the loss, and the gradients of its logits."""
    layout = make_layout(expert=1, device=torch.device("cpu"))
    term, batch = make_term("global", Context(layout=layout, group_sequences=SEQUENCES)), make_batch(valid_on(rank))
    token_V = batch.info.valid_T.nonzero().squeeze(1)
    total, gradients = 0.0, []
    for micro in range(2):
        logits_TC = logits_of(rank, micro).requires_grad_()
        loss = term(routing_of(logits_TC, token_V, k=2, nulls=2), batch)[0]
        loss.backward()
        total += loss.item()
        gradients.append(logits_TC.grad)
    return total, gradients


def test_global_balance_is_exact_over_ranks_and_a_running_mean_over_accumulation_steps():
    results = run_ranks(global_balance, 2)
    copies = {(rank, micro): logits_of(rank, micro).requires_grad_() for rank in range(2) for micro in range(2)}
    tokens = {rank: valid_on(rank).nonzero().squeeze(1).tolist() for rank in range(2)}
    expected = torch.zeros((), dtype=torch.float64)
    for micro in range(2):
        seen = [(r, m, t) for r in range(2) for m in range(micro + 1) for t in tokens[r]]
        share = [sum(c in copies[r, m][t].topk(2).indices for r, m, t in seen) / len(seen) for c in range(6)]
        share[4:] = [(share[4] + share[5]) / 2] * 2
        for rank in range(2):
            for t in tokens[rank]:
                probs_C = copies[rank, micro][t].exp() / copies[rank, micro][t].exp().sum()
                expected = expected + 6 * sum(f * p for f, p in zip(share, probs_C))
    expected.backward()
    close(torch.tensor(sum(total for total, _ in results), dtype=torch.float64), expected.detach(), "the loss")
    for rank, (_, gradients) in enumerate(results):
        for micro, gradient in enumerate(gradients):
            close(gradient, copies[rank, micro].grad, f"gradient of rank {rank}, micro-batch {micro}")


def test_a_weight_may_change_at_given_steps():
    raw = {"load_balance": {"weight": [[2, 0.02], [5, 0.0001]]}}
    weights = [make_objective(loss_settings(raw), ONE_PROCESS, step).terms["load_balance"][0] for step in range(7)]
    assert weights == [0.0, 0.0, 0.02, 0.02, 0.02, 0.0001, 0.0001]
    assert [a != b for a, b in pairwise(weights)].count(True) == 2


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("step", [0, 0, 0.2, 0.2, 0.2, 0.2, 1, 1, 0, 0]),
        ("linear", [0, 0, 0.2, 0.4, 0.6, 0.8, 1, 0.5, 0, 0]),
        ("cosine", [0, 0, 0.2, *(0.6 - 0.4 * math.cos(math.pi * share) for share in (0.25, 0.5, 0.75)), 1, 0.5, 0, 0]),
    ],
)
def test_a_weight_is_interpolated_between_its_points(kind, expected):
    points = [[2, 0.2], [6, 1.0], [8, 0]]
    settings = loss_settings({"router_z": {"weight": {"type": kind, "points": points}}})["router_z"]
    assert [settings.weight_at(step) for step in range(10)] == pytest.approx(expected)
    stored = settings.model_dump(mode="json")
    assert stored["weight"] == (points if kind == "step" else {"type": kind, "points": points})
    assert loss_settings({"router_z": stored})["router_z"] == settings


def test_what_is_wrong_with_losses_is_said_by_name():
    for raw, message in (
        ({"load_balanec": {"weight": 1}}, r"'losses.load_balanec': there is no such .*did you mean 'load_balance'"),
        ({"router_z": {}}, "'losses.router_z.weight' is missing"),
        ({"router_z": {"weight": -1}}, "'losses.router_z.weight'"),
        ({"load_balance": {"weight": 1, "scope": "batch"}}, "'losses.load_balance.scope'"),
        ({"router_z": {"weight": [[5, 0.1], [2, 0.2]]}}, r"'losses.router_z.weight': the first steps \[5, 2\] do not"),
        ({"router_z": {"weight": [[5, 0.1], [5, 0.2]]}}, r"the first steps \[5, 5\] do not ascend"),
        ({"router_z": {"weight": []}}, "'losses.router_z.weight'"),
        ({"router_z": {"weight": "much"}}, "'losses.router_z.weight': input should be a valid number, got 'much'"),
        ({"router_z": {"weight": [[5, -0.1]]}}, "'losses.router_z.weight.0.1': input should be greater"),
        ({"router_z": {"weight": {"type": "root", "points": [[0, 1]]}}}, "'losses.router_z.weight.type'"),
        ({"router_z": {"weight": {"points": [[0, 1], [0, 2]]}}}, r"weight.points': the first steps \[0, 0\] do not"),
        ({"manifold": {"weight": 1, "neighbours": {"kind": "ball"}}}, "kind=ball and epsilon=None: kind ball needs"),
        ({"manifold": {"weight": 1, "neighbours": {"k": 0}}}, "'losses.manifold.neighbours.k'"),
        ({"manifold": {"weight": 1, "neighbours": {"sigma": 0}}}, "'losses.manifold.neighbours.sigma'"),
    ):
        with pytest.raises(UserError, match=message):
            loss_settings(raw)


def test_every_registered_loss_has_its_names_documented():
    from moe_dist.metrics.metric_keys import KEYS

    assert set(LOSSES) == set(TermSettings.kinds.values())
    for term in LOSSES.values():
        assert set(term.names) <= set(KEYS)
