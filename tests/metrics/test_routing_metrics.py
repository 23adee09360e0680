"""Routing metrics against naive loops over every assignment, on one rank and on real gloo ranks.

Shape suffixes: T tokens, N assignments, E experts.
"""

import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moe_dist.config.recipe import load_config
from moe_dist.core.batch import MODALITIES, TokenInfo
from moe_dist.core.routing_plan import Routing, RoutingPlan, RoutingRecord
from moe_dist.metrics.metric_keys import undeclared
from moe_dist.metrics.routing_metrics import routing_counts, routing_metrics
from moe_dist.model.moe.placement import make_placement
from moe_dist.parallel.collectives import sum_over_ranks
from moe_dist.parallel.layout import Layout, make_layout
from tests.support.distributed import run_ranks
from tests.support.launching import MOMA
from tests.training.test_any_layout import start as start_run

TOKENS, EXPERTS = 24, 6
GROUPS = ((0, 1, 2, 3), (4, 5))  # uneven: 4 text and 2 image experts
LAYERS = (0, 3)


def make_micro_batch(seed, share_valid=0.8, image_share=0.4):
    """Token facts, and for each layer a list of (token, expert) pairs; a token reaches 0, 1 or more experts."""
    generator = torch.Generator().manual_seed(seed)
    info = TokenInfo.build(
        modality_T=(torch.rand(TOKENS, generator=generator) < image_share).long(),
        valid_T=torch.rand(TOKENS, generator=generator) < share_valid,
        position_T=torch.arange(TOKENS),
        token_id_T=torch.arange(TOKENS),
        document_lengths=[TOKENS],
        num_groups=2,
    )
    pairs = []
    for layer in range(len(LAYERS)):
        chosen = torch.rand(EXPERTS, TOKENS, generator=generator) < 0.15 * (layer + 1)
        chosen[1] = False  # an expert without a token
        for e, t in torch.nonzero(chosen).tolist():
            chosen[e, t] = info.valid_T[t] and e in GROUPS[info.modality_T[t]]
        pairs.append([(t, e) for e, t in torch.nonzero(chosen).tolist()])
    return info, pairs


def make_records(pairs):
    records = []
    for layer, chosen in zip(LAYERS, pairs):
        plan = RoutingPlan(
            token_ids_N=torch.tensor([t for t, _ in chosen], dtype=torch.int64),
            weights_N=torch.ones(len(chosen)),
            counts_E=torch.bincount(torch.tensor([e for _, e in chosen], dtype=torch.int64), minlength=EXPERTS),
        )
        kept_TE = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool)
        for t, e in chosen:
            kept_TE[t, e] = True
        chosen_TE = kept_TE.clone()
        chosen_TE[:2, 0] = True  # found expert 0 full, unless they are in it
        empty_TE = torch.zeros(TOKENS, EXPERTS)
        routing = Routing(
            token_V=torch.arange(TOKENS), logits_VC=empty_TE, probs_VC=empty_TE, chosen_VC=chosen_TE, kept_VE=kept_TE
        )
        records.append(RoutingRecord(layer=layer, plan=plan, routings=(routing,)))
    return records


def oracle(micro_batches_by_rank, expert, local_experts):
    """The definitions, one assignment at a time. micro_batches_by_rank: [rank] -> list of (info, pairs)."""
    metrics, imbalances, tokens, assignments = {}, [], 0, 0
    for i, layer in enumerate(LAYERS):
        load, dropped = [0] * EXPERTS, 0
        rows = [0] * len(micro_batches_by_rank)
        experts_of = {m: [] for m in range(len(MODALITIES))}
        for rank, micro_batches in enumerate(micro_batches_by_rank):
            for info, pairs in micro_batches:
                dropped += 2 - sum((t, 0) in pairs[i] for t in range(2))
                for _, e in pairs[i]:
                    load[e] += 1
                    for r, held in enumerate(local_experts):
                        rows[rank // expert * expert + r] += sum(number % EXPERTS == e for number in held)
                for t in range(TOKENS):
                    if info.valid_T[t]:
                        experts_of[int(info.modality_T[t])].append(sum(token == t for token, _ in pairs[i]))
        for group in GROUPS:
            fair = sum(load[e] for e in group) / len(group)
            for e in group:
                metrics[f"moe/{layer}/utilization/{e}"] = load[e] / fair
        for m, counts in experts_of.items():
            tokens, assignments = tokens + len(counts), assignments + sum(counts)
            metrics[f"moe/{layer}/experts_per_token/{MODALITIES[m]}"] = sum(counts) / len(counts)
            metrics[f"moe/{layer}/unrouted_fraction/{MODALITIES[m]}"] = counts.count(0) / len(counts)
        metrics |= {f"moe/{layer}/dropped_fraction/{e}": 0.0 for e in range(1, EXPERTS)}
        metrics[f"moe/{layer}/dropped_fraction/0"] = dropped / (dropped + load[0])
        for start in range(0, len(rows), expert):
            members = rows[start : start + expert]
            imbalances.append(max(members) * expert / sum(members))
    return metrics | {"moe/rank_imbalance": max(imbalances), "moe/experts_per_token": assignments / tokens}


def flatten(metrics):
    flat = {}
    for key, value in metrics.items():
        flat.update({f"{key}/{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {key: value})
    return flat


def over_ranks(counts, layout):
    return counts.with_tensors(sum_over_ranks(counts.tensors(), layout.dp_group))


def measure(micro_batches, layout, local_experts):
    counts = [routing_counts(make_records(pairs), info, layout) for info, pairs in micro_batches]
    total = counts[0]
    for more in counts[1:]:
        total = total + more
    return routing_metrics(over_ranks(total, layout), expert_groups=GROUPS, local_experts=local_experts)


def test_one_rank_and_two_micro_batches_equal_the_loops():
    micro_batches = [make_micro_batch(seed) for seed in (1, 2)]
    metrics = measure(micro_batches, Layout(), [range(EXPERTS)])
    assert not undeclared(metrics)
    assert flatten(metrics) == pytest.approx(oracle([micro_batches], 1, [range(EXPERTS)]), abs=1e-12)
    assert metrics["moe/0/utilization"][1] == 0 and metrics["moe/rank_imbalance"] == 1


def _measure_on_rank(rank, expert, local_experts):
    layout = make_layout(expert=expert, device=torch.device("cpu"))
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as spy:
        metrics = measure(_of_rank(rank), layout, local_experts)
    return metrics, spy.call_count


def _of_rank(rank):
    """Ranks differ strongly: in padding, in the share of images and in the number of assignments."""
    return [make_micro_batch(10 * rank + i, 1 - 0.2 * rank, 0.2 + 0.15 * rank) for i in range(2)]


@pytest.mark.parametrize(
    ("world", "expert", "local_experts"),
    [(2, 2, [(0, 1, 4), (2, 3, 5)]), (2, 1, [range(EXPERTS)]), (4, 2, [(3, 0, 4), (1, 2, 5)])],
)
def test_ranks_equal_the_loops_with_one_all_reduce(world, expert, local_experts):
    results = run_ranks(_measure_on_rank, world, expert, local_experts)
    expected = oracle([_of_rank(rank) for rank in range(world)], expert, local_experts)
    assert (expected["moe/rank_imbalance"] > 1.05) == (expert > 1)
    for metrics, all_reduces in results:
        assert flatten(metrics) == pytest.approx(expected, abs=1e-12)
        assert all_reduces == 1


SLICED = make_placement(GROUPS, 2, slices=2).local_experts


def test_ranks_that_share_every_expert_by_slices_are_in_balance():
    """And they are not where two slices have changed places."""
    for metrics in run_ranks(_measure_on_rank, 2, 2, SLICED):
        assert metrics[0]["moe/rank_imbalance"] == pytest.approx(1, abs=1e-12)
    uneven = [(0, 1, 2, 3, 4, 6), (5, 7, 8, 9, 10, 11)]
    expected = oracle([_of_rank(rank) for rank in range(2)], 2, uneven)
    assert expected["moe/rank_imbalance"] > 1.02
    for metrics, _ in run_ranks(_measure_on_rank, 2, 2, uneven):
        assert flatten(metrics) == pytest.approx(expected, abs=1e-12)


def _imbalance_of_runs(rank, overrides):
    ways = [load_config(MOMA, [*overrides, f"model.ffn.slices={slices}"]) for slices in (1, 2)]
    return [start_run(config).train_step()["moe/rank_imbalance"] for config in ways]


def test_a_run_of_seven_text_experts_and_one_of_images_is_in_balance_with_slices(overrides):
    children = [f"model.ffn.router.{name}.num_experts={number}" for name, number in (("text", 7), ("image", 1))]
    for whole, sliced in run_ranks(_imbalance_of_runs, 2, [*overrides, *children, "parallel.expert=2"]):
        assert whole > 1.1 and sliced == pytest.approx(1, abs=1e-12)


def test_missing_modality_and_empty_plans():
    info, _ = make_micro_batch(5, image_share=0.0)
    metrics = measure([(info, [[], [(0, 0), (0, 2)]])], Layout(), [(0, 1, 2), (3, 4, 5)])
    assert not any(key.endswith("/image") for key in metrics)
    assert metrics["moe/0/unrouted_fraction/text"] == 1
    assert all(math.isnan(value) for value in metrics["moe/0/utilization"])
    assert metrics["moe/3/utilization"][:4] == [2, 0, 2, 0]
    assert metrics["moe/rank_imbalance"] == 2  # layer 0 has no rows: only layer 3 counts
    nothing = measure([(info, [[], []])], Layout(), [(0, 1, 2), (3, 4, 5)])
    assert math.isnan(nothing["moe/rank_imbalance"])


def test_counts_of_different_layers_do_not_add_up():
    info, pairs = make_micro_batch(0)
    records = make_records(pairs)
    counts = routing_counts(records, info, Layout())
    with pytest.raises(ValueError, match="do not add up"):
        counts + routing_counts(records[:1], info, Layout())


DOMAINS = ("animals", "plants", "unseen")


def domains_of(seed):
    return torch.randint(-1, 2, (TOKENS,), generator=torch.Generator().manual_seed(seed))


def measure_domains(micro_batches, layout, local_experts):
    """micro_batches: (seed of the domains, (info, pairs)) of one rank."""
    counts = [
        routing_counts(make_records(pairs), info, layout, domain_T=domains_of(seed), num_domains=len(DOMAINS))
        for seed, (info, pairs) in micro_batches
    ]
    total = counts[0] + counts[1]
    total = over_ranks(total, layout)
    metrics = routing_metrics(total, expert_groups=GROUPS, local_experts=local_experts, domains=DOMAINS)
    return {key: value for key, value in metrics.items() if "/domain_share/" in key}


def domain_oracle(micro_batches_by_rank):
    """The share of each expert in a domain's assignments, one assignment at a time."""
    metrics = {}
    for i, layer in enumerate(LAYERS):
        for d, domain in enumerate(DOMAINS):
            experts = [
                e
                for micro_batches in micro_batches_by_rank
                for seed, (_, pairs) in micro_batches
                for t, e in pairs[i]
                if domains_of(seed)[t] == d
            ]
            if experts:
                metrics[f"moe/{layer}/domain_share/{domain}"] = [
                    experts.count(e) / len(experts) for e in range(EXPERTS)
                ]
    return metrics


def _domain_batches(rank):
    return [(100 * rank + i, batch) for i, batch in enumerate(_of_rank(rank))]


def _measure_domains_on_rank(rank, expert, local_experts):
    layout = make_layout(expert=expert, device=torch.device("cpu"))
    return measure_domains(_domain_batches(rank), layout, local_experts)


def test_domain_shares_equal_the_loops():
    metrics = measure_domains(_domain_batches(0), Layout(), [range(EXPERTS)])
    expected = domain_oracle([_domain_batches(0)])
    assert not undeclared(metrics) and len(expected) == 2 * len(LAYERS), "the domain without a token has no key"
    assert flatten(metrics) == pytest.approx(flatten(expected), abs=1e-12)


@pytest.mark.parametrize(
    ("world", "expert", "local_experts"), [(2, 2, [(0, 1, 4), (2, 3, 5)]), (2, 1, [range(EXPERTS)])]
)
def test_domain_shares_are_exact_over_ranks(world, expert, local_experts):
    expected = flatten(domain_oracle([_domain_batches(rank) for rank in range(world)]))
    for metrics in run_ranks(_measure_domains_on_rank, world, expert, local_experts):
        assert flatten(metrics) == pytest.approx(expected, abs=1e-12)
