"""The caption gain compared with plain loops over the documents."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moe_dist.data.stream.held_out_batches import ShuffledCaptions
from moe_dist.evaluate.captions import caption_gain
from moe_dist.evaluate.held_out_split import HeldOutSplit
from moe_dist.parallel.layout import Layout, make_layout
from tests.support.distributed import run_ranks
from tests.support.synthetic_store import MemoryDocument, MemoryStore, SmallVocabulary, data_config, random_store

V = SmallVocabulary
TABLE = 3 * torch.randn(V.size, V.size, generator=torch.Generator().manual_seed(0))


def store():
    """Return three drawings of each of eleven things, equal in their first code, and texts that must be ignored."""
    rng = np.random.default_rng(0)
    documents = random_store(1, texts=5).documents
    for thing in range(11):
        caption = np.array([V.first_text + thing, V.first_text + 20])
        code = int(TABLE[caption[0]][V.first_image :].argmax()) + V.first_image
        documents += [MemoryDocument(caption, np.array([code, *rng.integers(V.first_image, V.size, 4)])) for _ in "abc"]
    return MemoryStore(documents)


def reads_the_caption(batch):
    """Predict every token from the first word of its document, as the naive loop does."""
    start_T = torch.arange(batch.info.num_tokens) - batch.info.position_T
    return SimpleNamespace(logits_TV=TABLE[batch.tokens_T[(start_T + 1).clamp(max=batch.info.num_tokens - 1)]])


def sees_the_last_token(batch):
    return SimpleNamespace(logits_TV=TABLE[batch.tokens_T])


def compute(forward, layout=None, groups=99):
    held_out = HeldOutSplit(V, data_config(), layout or Layout(), groups=groups, batch_groups=2)
    return caption_gain(forward, store(), held_out)


def test_the_gain_and_its_interval_equal_plain_loops():
    documents, shuffled = store(), ShuffledCaptions(store())
    gains = {}
    for i in np.flatnonzero(documents.has_image):
        losses = [
            -float(TABLE[of.document(i).text[0]].log_softmax(0)[documents.document(i).image].mean())
            for of in (documents, shuffled)
        ]
        gains.setdefault(int(documents.document(i).text[0]), []).append(losses[1] - losses[0])
    means = np.array([np.mean(of_caption) for of_caption in gains.values()])
    half = 1.959964 * means.std(ddof=1) / np.sqrt(11)
    found = compute(reads_the_caption)
    assert len(means) == found["eval/caption_gain/captions"] == 11
    assert found["eval/caption_gain"] == pytest.approx(means.mean(), abs=1e-6)
    assert found["eval/caption_gain/low"] == pytest.approx(means.mean() - half, abs=1e-6)
    assert found["eval/caption_gain/high"] == pytest.approx(means.mean() + half, abs=1e-6)
    assert found["eval/caption_gain"] > 0.1


def test_to_a_model_that_does_not_read_them_captions_are_worth_nothing():
    assert compute(sees_the_last_token)["eval/caption_gain"] == pytest.approx(0, abs=1e-9)


def test_groups_say_how_much_is_looked_at():
    assert 2 <= compute(reads_the_caption, groups=2)["eval/caption_gain/captions"] < 11


def on_rank(rank):
    return compute(reads_the_caption, make_layout(expert=1, device=torch.device("cpu")))


def test_two_ranks_find_the_same():
    for found in run_ranks(on_rank, 2):
        assert found == pytest.approx(compute(reads_the_caption), abs=1e-9)


def test_without_two_captions_there_is_nothing():
    texts = random_store(1, texts=3)
    held_out = HeldOutSplit(V, data_config(), Layout(), groups=9, batch_groups=1)
    assert caption_gain(sees_the_last_token, texts, held_out) == {}
