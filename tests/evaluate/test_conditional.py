"""Conditional losses compared with plain loops over the documents."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moe_dist.data.tasks.instructions import InstructionPrompt
from moe_dist.evaluate.conditional import conditional_losses
from moe_dist.evaluate.held_out_split import HeldOutSplit
from moe_dist.parallel.layout import Layout, make_layout
from tests.support.distributed import run_ranks
from tests.support.synthetic_store import MemoryDocument, MemoryStore, SmallVocabulary, data_config, random_store

V = SmallVocabulary
TABLE = 3 * torch.randn(V.size, V.size, generator=torch.Generator().manual_seed(0))
DATA = data_config()


def store():
    """Return pairs, one without a caption and one with a cut caption, and texts and an instruction to be ignored."""
    documents = random_store(1, pairs=23, texts=9).documents
    rng = np.random.default_rng(0)
    documents += [
        MemoryDocument(np.zeros(0, dtype=np.int64), rng.integers(V.first_image, V.size, 6)),
        MemoryDocument(rng.integers(V.first_text, V.first_image, 60), rng.integers(V.first_image, V.size, 6)),
        MemoryDocument(np.array([7, 8, 9]), rng.integers(V.first_image, V.size, 6), InstructionPrompt(2, "a", 1)),
    ]
    return MemoryStore(documents)


def forward(batch):
    return SimpleNamespace(logits_TV=TABLE[batch.tokens_T])


def naive(image_first):
    losses = []
    for document in store().documents:
        if document.image is None or document.prompt is not None:
            continue
        caption = document.text[: DATA.sequence_length - 10].tolist()
        image = [V.boi, *document.image.tolist(), V.eoi]
        tokens = [V.bos, *image, *caption, V.eos] if image_first else [V.bos, *caption, *image, V.eos]
        for at, (token, target) in enumerate(pairwise(tokens)):
            if at >= 1 + 7 if image_first else target >= V.first_image:
                losses.append(-float(TABLE[token].log_softmax(0)[target]))
    return sum(losses) / len(losses)


def compute(layout=None):
    return conditional_losses(forward, store(), HeldOutSplit(V, DATA, layout or Layout(), groups=99, batch_groups=2))


def test_losses_equal_plain_loops():
    found = compute()
    assert found["eval/image_to_text"] == pytest.approx(naive(True), abs=1e-6)
    assert found["eval/text_to_image"] == pytest.approx(naive(False), abs=1e-6)
    assert abs(found["eval/image_to_text"] - found["eval/text_to_image"]) > 0.1


def on_rank(rank):
    return compute(make_layout(expert=1, device=torch.device("cpu")))


def test_two_ranks_find_the_same():
    for found in run_ranks(on_rank, 2):
        assert found == pytest.approx(compute(), abs=1e-9)


def test_without_pairs_there_is_nothing():
    held_out = HeldOutSplit(V, DATA, Layout(), groups=9, batch_groups=1)
    assert conditional_losses(forward, random_store(1, texts=9), held_out) == {}
