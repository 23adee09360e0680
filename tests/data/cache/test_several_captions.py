"""Documents with several captions: from a list in the tar to the tokens of every epoch, compared with the texts."""

from itertools import islice

import pytest

from moe_dist.config.recipe import DataConfig
from moe_dist.core.errors import UserError
from moe_dist.core.strict import validate
from moe_dist.data.cache.token_cache import build_cache, load_vocabulary, open_store
from moe_dist.data.shards.tars import Sample, write_shards
from moe_dist.data.stream.held_out_batches import held_out_batches
from moe_dist.data.stream.loader import make_loader

SAMPLES = 12


def captions_of(number: int) -> list[str]:
    """Return the captions of sample `number`: 1, 2 or 3 texts that no other sample has."""
    return [f"{word} {number}" for word in ("red heart", "a heart, red", "heart")[: 1 + number % 3]]


@pytest.fixture
def opened(tokenizers, emoji_samples, tmp_path):
    """Return a function that opens 12 samples with 1 to 3 captions, every fourth without a picture."""
    for split in ("train", "validation"):
        samples = [
            Sample(f"{split}{i:02d}", split, emoji_samples[0].png if i % 4 else None, None, {"caption": captions_of(i)})
            for i in range(SAMPLES)
        ]
        write_shards(samples, tmp_path / split, samples_per_shard=5)

    def make(split="train", **changes):
        raw = {"text_tokenizer": str(tokenizers / "text.model"), "image_tokenizer": str(tokenizers / "vq")}
        raw |= {"shards": str(tmp_path / split / split), "validation_shards": "unused", "sequence_length": 64}
        raw |= {"lanes": 2, "group_sequences": 2, "caption_dropout": 0.0}
        data = validate(DataConfig, raw | changes, "test", "data")
        vocabulary = load_vocabulary(data)
        build_cache(data, "train", vocabulary)
        return data, vocabulary, open_store(data, "train", vocabulary)

    return make


def number_of(caption: str) -> int:
    return int(caption.rpartition(" ")[2])


def texts_of(batch, vocabulary) -> list[str]:
    """Return the texts of a batch's documents, without those that are cut."""
    texts = []
    for tokens in batch.tokens_T.split(list(batch.info.document_lengths)):
        if tokens[0] == vocabulary.bos and tokens[-1] == vocabulary.eos:
            kept = [
                t for t in tokens.tolist() if t < vocabulary.text.size and t not in (vocabulary.bos, vocabulary.eos)
            ]
            texts.append(vocabulary.text.decode(kept))
    return texts


def test_every_caption_is_stored_by_its_number(opened):
    _, vocabulary, store = opened()
    decoded = [
        [vocabulary.text.decode(store.document(i, choice).text) for choice in range(7)] for i in range(len(store))
    ]
    assert sorted(number_of(texts[0]) for texts in decoded) == list(range(SAMPLES))
    for index, texts in enumerate(decoded):
        captions = captions_of(number_of(texts[0]))
        assert texts == [captions[choice % len(captions)] for choice in range(7)]
        document = store.document(index)
        assert store.lengths[index] == len(document.text) + (0 if document.image is None else len(document.image))
        assert (document.image is None) == (number_of(texts[0]) % 4 == 0)
    assert store.pairs == 9 and store.texts == 3 and store.report.used == SAMPLES and not store.report.unused


def test_training_reads_every_caption_and_held_out_batches_the_first(opened):
    data, vocabulary, store = opened()
    loader = make_loader(store, vocabulary, data, seed=3, dp_rank=0, dp=1, batch_groups=1)
    trained = {text for item in islice(loader, 60) for text in texts_of(item.batch, vocabulary)}
    assert trained == {caption for i in range(SAMPLES) for caption in captions_of(i)}
    batches = held_out_batches(store, vocabulary, data, groups=100, dp_rank=0, dp=1, batch_groups=1)
    read = [text for batch in batches for text in texts_of(batch, vocabulary)]
    assert sorted(read) == sorted(captions_of(i)[0] for i in range(SAMPLES))


def test_a_sample_with_a_cut_caption_is_lost_once(opened):
    _, vocabulary, store = opened()
    lengths = {i: [len(vocabulary.text.encode(caption)) for caption in captions_of(i)] for i in range(SAMPLES) if i % 4}
    room = 4
    lost = {i: sum(max(0, length - room) for length in of) for i, of in lengths.items()}
    written = sum(sum(of) for i, of in lengths.items() if lost[i])
    short = {"sequence_length": store.image_tokens // 9 + 4 + room}
    report = opened(**short, max_bad_fraction=1.0)[2].report
    expected = f"caption cut: {sum(lost.values())} of {written} tokens"
    assert dict(report.lost) == {expected: sum(map(bool, lost.values()))} and sum(lost.values()) > 0
    with pytest.raises(UserError, match=expected):
        opened(**short)
