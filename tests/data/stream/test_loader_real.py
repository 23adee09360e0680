"""The loader on real emoji pairs: captions survive, images stay whole, and there is little padding."""

from itertools import islice

import pytest
import torch

from moe_dist.data.stream.loader import make_loader
from tests.support.emoji_store import emoji_store, emoji_vocabulary
from tests.support.synthetic_store import data_config


@pytest.fixture(scope="module")
def vocabulary(emoji_samples, tmp_path_factory):
    return emoji_vocabulary(emoji_samples, tmp_path_factory.mktemp("tokenizer"))


def test_real_pairs_reach_the_batch_whole_and_with_little_padding(emoji_samples, vocabulary):
    store = emoji_store(emoji_samples, "train", vocabulary)
    config = data_config(sequence_length=512, group_sequences=2, lanes=2)
    loader = make_loader(store, vocabulary, config, seed=0, dp_rank=0, dp=1, batch_groups=2)
    captions = {s.caption for s in emoji_samples if s.split == "train"}
    seen, orders, valid, total = set(), [], 0, 0
    for batch, *_ in islice(loader, 12):
        valid, total = valid + int(batch.info.valid_T.sum()), total + batch.info.num_tokens
        for tokens in batch.tokens_T.split(list(batch.info.document_lengths)):
            if tokens[0] == vocabulary.pad:
                continue
            assert tokens[0] == vocabulary.bos and tokens[-1] == vocabulary.eos
            begin, end = (int((tokens == marker).nonzero()) for marker in (vocabulary.boi, vocabulary.eoi))
            assert end - begin == 65 and bool((vocabulary.modality_of[tokens[begin + 1 : end]] == 1).all())
            text = torch.cat([tokens[1:begin], tokens[end + 1 : -1]])
            seen.add(vocabulary.text.decode(text.tolist()))
            orders.append(begin == 1)
    assert seen == captions | {""}
    assert 0.3 < sum(orders) / len(orders) < 0.8
    assert valid / total > 0.95
