"""Held-out losses compared with sums by hand, on one and on several ranks."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from moe_dist.data.stream.held_out_batches import held_out_batches
from moe_dist.evaluate.perplexity import evaluate
from moe_dist.parallel.layout import Layout, make_layout
from tests.support.distributed import run_ranks
from tests.support.synthetic_store import SmallVocabulary, data_config, random_store


def table_forward(batch):
    """Return logits that depend only on the token. Must be called without gradients."""
    assert not torch.is_grad_enabled()
    table = torch.randn(SmallVocabulary.size, SmallVocabulary.size, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(logits_TV=table.bfloat16()[batch.tokens_T])


def batches(rank=0, dp=1, *, pairs=20, groups=100):
    store = random_store(2, pairs=pairs, texts=20)
    config = data_config()
    return held_out_batches(store, SmallVocabulary, config, groups=groups, dp_rank=rank, dp=dp, batch_groups=2)


def test_means_over_the_counted_predictions_of_each_modality():
    losses = {"text": [], "image": []}
    for batch in batches():
        with torch.no_grad():
            logits = table_forward(batch).logits_TV.double()
        for t in batch.loss_mask_T.nonzero().squeeze(1).tolist():
            name = "image" if batch.targets_T[t] >= SmallVocabulary.first_image else "text"
            losses[name].append(F.cross_entropy(logits[t], batch.targets_T[t]).item())
    result = evaluate(table_forward, batches(), Layout())
    assert result["eval/loss/text"] == pytest.approx(sum(losses["text"]) / len(losses["text"]), rel=1e-5)
    assert result["eval/loss/image"] == pytest.approx(sum(losses["image"]) / len(losses["image"]), rel=1e-5)
    both = losses["text"] + losses["image"]
    assert result["eval/loss"] == pytest.approx(sum(both) / len(both), rel=1e-5)


def test_a_modality_without_predictions_has_no_key():
    found = evaluate(table_forward, batches(pairs=0), Layout())
    assert {key for key in found if not key.endswith(("/low", "/high"))} == {
        "eval/loss",
        "eval/loss/text",
        "eval/accuracy",
    }


def test_the_interval_and_the_accuracy_are_over_documents():
    sums = []  # of each document: loss, hits, predictions
    for batch in batches():
        with torch.no_grad():
            logits = table_forward(batch).logits_TV.double()
        for document in range(len(batch.info.document_lengths)):
            counted = (batch.loss_mask_T & (batch.info.document_T == document)).nonzero().squeeze(1).tolist()
            if counted:
                losses = [F.cross_entropy(logits[t], batch.targets_T[t]).item() for t in counted]
                hits = sum(int(logits[t].argmax()) == int(batch.targets_T[t]) for t in counted)
                sums.append((sum(losses), hits, len(counted)))
    result = evaluate(table_forward, batches(), Layout())
    predictions = sum(n for _, _, n in sums)
    mean = sum(loss for loss, _, _ in sums) / predictions
    squares = sum((loss - mean * n) ** 2 for loss, _, n in sums)
    half = 1.959964 * (squares * len(sums) / (len(sums) - 1)) ** 0.5 / predictions
    assert (result["eval/loss/low"], result["eval/loss/high"]) == pytest.approx((mean - half, mean + half), rel=1e-4)
    assert result["eval/accuracy"] == pytest.approx(sum(hits for _, hits, _ in sums) / predictions)
    assert 0 <= result["eval/accuracy/low"] < result["eval/accuracy"] < result["eval/accuracy/high"] <= 1


def in_domains(given):
    """Give every third token no domain and the others one of two domains in turn."""
    for batch in given:
        domain_T = torch.arange(batch.info.num_tokens) % 3 - 1
        yield replace(batch, sidecar={"domain_T": domain_T})


def test_each_domain_has_a_mean_of_its_own():
    sums, counts = [0.0, 0.0], [0, 0]
    for batch in in_domains(batches()):
        with torch.no_grad():
            logits = table_forward(batch).logits_TV.double()
        for t in batch.loss_mask_T.nonzero().squeeze(1).tolist():
            if t % 3:
                sums[t % 3 - 1] += F.cross_entropy(logits[t], batch.targets_T[t]).item()
                counts[t % 3 - 1] += 1
    result = evaluate(table_forward, in_domains(batches()), Layout(), ("birds", "ships", "nothing"))
    assert result["eval/loss/domain/birds"] == pytest.approx(sums[0] / counts[0], rel=1e-5)
    assert result["eval/loss/domain/ships"] == pytest.approx(sums[1] / counts[1], rel=1e-5)
    assert "eval/loss/domain/nothing" not in result
    plain = evaluate(table_forward, batches(), Layout())
    assert {key: result[key] for key in plain} == pytest.approx(plain, rel=1e-12)


def losses_of_rank(rank, world):
    layout = make_layout(expert=1, device=torch.device("cpu"))
    return evaluate(table_forward, batches(rank, world, groups=7), layout)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_equal_one_process(world):
    alone = evaluate(table_forward, batches(groups=7), Layout())
    for result in run_ranks(losses_of_rank, world, world):
        assert result == pytest.approx(alone, rel=1e-12)
