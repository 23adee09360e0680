"""Admissions and the agreement of auxiliary routers against loops over every decision, on one rank and on two."""

import pytest
import torch

from moe_dist.core.batch import MODALITIES
from moe_dist.metrics.metric_keys import undeclared
from moe_dist.metrics.router_agreement import decision_counts, decision_metrics
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.collectives import sum_over_ranks
from moe_dist.parallel.layout import Layout, make_layout
from tests.model.test_causal import DEPTH, with_auxiliary
from tests.support.distributed import run_ranks
from tests.support.model_batches import DENSE, EXPERT_CHOICE, MOMA, VOCAB, make_batch, model_config

FFNS = {"dense": DENSE, "moe_8x": EXPERT_CHOICE, "moma": MOMA}


def run(ffn, rank):
    model = Transformer(model_config(with_auxiliary(ffn), depth=DEPTH), VOCAB, Layout(), seed=1).double()
    batch = make_batch([20 + 10 * rank, 9], padding=6, seed=rank)
    return batch, model(batch.tokens_T, batch.info)


def metrics_of(output, info, layout):
    counts = decision_counts(output.records, output.depths, info)
    totals = sum_over_ranks(list(counts.values()), layout.dp_group) if counts else []
    return decision_metrics(dict(zip(counts, totals, strict=True)))


def decisions(part, info):
    """(modality, said, true) of every token and column."""
    for token, said, true in zip(part.token_V.tolist(), (part.auxiliary_VC > 0).tolist(), part.chosen_VC.tolist()):
        for a, b in zip(said, true):
            yield int(info.modality_T[token]), a, b


def oracle(ffn, ranks):
    metrics, runs = {}, [run(ffn, rank) for rank in range(ranks)]

    def agreement(prefix, suffix, found):
        metrics[f"{prefix}accuracy{suffix}"] = sum(a == b for _, a, b in found) / len(found)
        metrics[f"{prefix}precision{suffix}"] = sum(a and b for _, a, b in found) / sum(a for _, a, _ in found)
        metrics[f"{prefix}recall{suffix}"] = sum(a and b for _, a, b in found) / sum(b for *_, b in found)

    for i in range(3 if ffn is not DENSE else 0):
        found = [
            d for batch, output in runs for part in output.records[i].routings for d in decisions(part, batch.info)
        ]
        for m, name in enumerate(MODALITIES):
            agreement(f"moe/{i}/auxiliary_", f"/{name}", [d for d in found if d[0] == m])
    for i, layer in enumerate((0, 2)):
        found = [d for batch, output in runs for d in decisions(output.depths[i].routing, batch.info)]
        agreement(f"moe/{layer}/depth_", "", found)
        for m, name in enumerate(MODALITIES):
            metrics[f"moe/{layer}/admitted/{name}"] = sum(b for k, _, b in found if k == m) / sum(
                k == m for k, *_ in found
            )
    return metrics


@pytest.mark.parametrize("ffn", FFNS.values(), ids=FFNS)
def test_one_rank_equals_the_loops(ffn):
    batch, output = run(ffn, 0)
    metrics = metrics_of(output, batch.info, Layout())
    assert metrics == pytest.approx(oracle(ffn, 1), abs=1e-12) and not undeclared(metrics)
    shares = [metrics[f"moe/0/admitted/{name}"] for name in MODALITIES]
    assert shares[0] != shares[1]  # of the scope group: each modality's share is what the gate makes it


def on_rank(rank):
    layout = make_layout(expert=1, device=torch.device("cpu"))
    batch, output = run(MOMA, rank)
    return metrics_of(output, batch.info, layout)


def test_two_ranks_equal_the_loops_over_both():
    expected = oracle(MOMA, 2)
    for metrics in run_ranks(on_rank, 2):
        assert metrics == pytest.approx(expected, abs=1e-12)


def test_nothing_to_tell_of_a_model_without_either():
    model, batch = Transformer(model_config(MOMA), VOCAB, Layout(), seed=1), make_batch([9])
    output = model(batch.tokens_T, batch.info)
    assert metrics_of(output, batch.info, Layout()) == {}


def test_a_modality_without_tokens_has_no_key():
    model = Transformer(model_config(with_auxiliary(MOMA), depth=DEPTH), VOCAB, Layout(), seed=1)
    batch = make_batch([1])
    output = model(batch.tokens_T, batch.info)
    keys = metrics_of(output, batch.info, Layout())
    assert {key.rsplit("/", 1)[1] for key in keys} & set(MODALITIES) == {MODALITIES[int(batch.info.modality_T[0])]}
