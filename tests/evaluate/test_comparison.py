"""References for the held-out loss: a bigram model ties with itself, and a model that learns beats it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moe_dist.config.model_section import ModelConfig
from moe_dist.core.strict import validate
from moe_dist.data.stream.loader import make_loader
from moe_dist.evaluate.bigram import Bigram, Bigrams
from moe_dist.evaluate.comparison import compare_with_references
from moe_dist.evaluate.held_out_split import HeldOutSplit
from moe_dist.losses.language import language_loss
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout
from tests.support.model_batches import MOMA
from tests.support.synthetic_store import MemoryDocument, MemoryStore, SmallVocabulary, data_config

V = SmallVocabulary
WORDS, CODES = 8, 6


def paired_store(seed, count):
    """Return pictures named by two words, one for each half. A bigram model sees only one token back."""
    table = np.random.default_rng(0).integers(V.first_image, V.size, (2, WORDS, CODES // 2))
    rng = np.random.default_rng(seed)
    documents = []
    for first, second in rng.integers(0, WORDS, (count, 2)):
        caption = np.array([V.first_text + first, V.first_text + WORDS + second])
        documents.append(MemoryDocument(caption, np.concatenate([table[0, first], table[1, second]])))
    return MemoryStore(documents)


TRAIN, HELD_OUT, DATA = paired_store(1, 600), paired_store(2, 120), data_config()


def compare(forward):
    held_out = HeldOutSplit(V, DATA, Layout(), groups=99, batch_groups=2)
    return compare_with_references(forward, held_out, train=TRAIN, store=HELD_OUT)


def test_the_bigram_model_as_the_model_ties_with_the_reference():
    bigram = Bigram.fit(TRAIN, V, DATA)
    successor = np.arange(V.size)
    rows = [bigram.log_probability(Bigrams(np.full(V.size, context), successor)) for context in range(V.size)]
    table = torch.tensor(np.array(rows))
    results = compare(lambda batch: SimpleNamespace(logits_TV=table[batch.tokens_T]))
    for modality in ("text", "image"):
        assert results[f"eval/loss/{modality}"] == pytest.approx(results[f"eval/bigram/{modality}"], abs=1e-6)
        assert results[f"eval/shuffled/loss/{modality}"] == pytest.approx(results[f"eval/loss/{modality}"], abs=0.02)


@pytest.mark.slow
def test_a_small_moma_beats_the_bigram_model_and_needs_its_captions():
    """Loader, model, objective and evaluation work together. A caption determines its image, and the reverse."""
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "init_std": 0.05}
    model = Transformer(validate(ModelConfig, sizes | {"ffn": MOMA}, "test"), V.size, Layout(), seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loader = make_loader(TRAIN, V, DATA, seed=0, dp_rank=0, dp=1, batch_groups=8)
    for _ in range(250):
        batch = next(loader).batch
        optimizer.zero_grad()
        (language_loss(model(batch.tokens_T, batch.info).logits_TV, batch).total / batch.loss_mask_T.sum()).backward()
        optimizer.step()
    with torch.no_grad():
        results = compare(lambda batch: model(batch.tokens_T, batch.info))
    for modality in ("text", "image"):
        assert results[f"eval/loss/{modality}"] < results[f"eval/bigram/{modality}"] - 0.3
        assert results[f"eval/loss/{modality}"] < results[f"eval/shuffled/loss/{modality}"] - 0.3
