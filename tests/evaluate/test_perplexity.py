"""Held-out losses against sums by hand, at one and at several ranks."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from moe_dist.data.heldout import heldout_batches
from moe_dist.evaluate.perplexity import evaluate
from moe_dist.parallel.layout import Layout, make_layout
from tests.data.synthetic import SmallVocabulary, data_config, random_store
from tests.distributed import run_ranks


def table_forward(batch):
    """A model whose logits depend on the token alone; it must be called without gradients."""
    assert not torch.is_grad_enabled()
    table = torch.randn(SmallVocabulary.size, SmallVocabulary.size, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(logits_TV=table.bfloat16()[batch.tokens_T])


def batches(rank=0, dp=1, *, pairs=20, groups=100):
    store = random_store(2, pairs=pairs, texts=20)
    config = data_config()
    return heldout_batches(store, SmallVocabulary, config, groups=groups, dp_rank=rank, dp=dp, batch_groups=2)


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
    assert set(evaluate(table_forward, batches(pairs=0), Layout())) == {"eval/loss", "eval/loss/text"}


def losses_of_rank(rank, world):
    layout = make_layout(expert=1, device=torch.device("cpu"))
    return evaluate(table_forward, batches(rank, world, groups=7), layout)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_equal_one_process(world):
    alone = evaluate(table_forward, batches(groups=7), Layout())
    for result in run_ranks(losses_of_rank, world, world):
        assert result == pytest.approx(alone, rel=1e-12)
