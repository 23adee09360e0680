"""The bigram baseline: a normalised distribution, close to a known source, and better than simpler baselines."""

import numpy as np
import pytest
import torch

from moe_dist.core.batch import IMAGE, TEXT
from moe_dist.data.stream.held_out_batches import ShuffledCaptions, held_out_batches
from moe_dist.evaluate.bigram import Bigram, Bigrams
from moe_dist.evaluate.perplexity import mean_losses
from moe_dist.parallel.layout import Layout
from tests.support.emoji_store import emoji_store, emoji_vocabulary
from tests.support.synthetic_store import MemoryDocument, MemoryStore, SmallVocabulary, data_config, random_store

V = SmallVocabulary


def chain_store(seed, count, transition):
    """Return texts and images drawn from a known Markov chain; the first id of a document is uniform."""
    rng = np.random.default_rng(seed)

    def walk(first, last, length):
        ids = [int(rng.integers(first, last))]
        while len(ids) < length:
            p = transition[ids[-1], first:last]
            ids.append(first + int(rng.choice(last - first, p=p / p.sum())))
        return np.array(ids)

    return MemoryStore(
        [
            MemoryDocument(walk(V.first_text, V.first_image, rng.integers(2, 12)), walk(V.first_image, V.size, 8))
            for _ in range(count)
        ]
    )


def test_probabilities_of_every_context_add_up_to_one():
    """This includes contexts and successors that do not occur in the training documents."""
    bigram = Bigram.fit(random_store(0, pairs=12, texts=8), V, data_config())
    for context in range(V.size):
        p = np.exp(bigram.log_probability(Bigrams(np.full(V.size, context), np.arange(V.size))))
        assert p.sum() == pytest.approx(1, abs=1e-12) and p.min() > 0


@pytest.mark.parametrize("kinds", [{"texts": 30}, {"pairs": 30, "caption": 0}, {"texts": 1}])
def test_text_only_captionless_and_tiny_stores(kinds):
    store = random_store(1, **kinds)
    bigram = Bigram.fit(store, V, data_config())
    p = np.exp(bigram.log_probability(Bigrams(np.full(V.size, V.bos), np.arange(V.size))))
    assert p.sum() == pytest.approx(1, abs=1e-12) and p.min() > 0


def test_by_hand_with_plain_counts():
    """Without the discount, the model gives the relative frequencies. The discount moves probability mass only."""
    store = MemoryStore([MemoryDocument(np.array([10, 11, 10, 12]), None)] * 50)
    bigram = Bigram.fit(store, V, data_config())
    p = np.exp(bigram.log_probability(Bigrams(np.array([10, 10, 11, V.bos]), np.array([11, 12, 10, 10]))))
    discount = bigram._models[TEXT].discount
    assert discount < 1
    assert p[0] == p[1] == pytest.approx(0.5, abs=discount / 100)
    assert p[2] == pytest.approx(1, abs=discount / 50) and p[3] == pytest.approx(1, abs=discount / 50)


def test_approaches_the_true_chain_and_beats_the_unigram():
    rng = np.random.default_rng(5)
    transition = rng.dirichlet(np.full(V.size, 0.2), V.size)
    train, held = chain_store(0, 3000, transition), chain_store(1, 400, transition)
    config = data_config(sequence_length=64)
    bigram = Bigram.fit(train, V, config)
    batches = list(held_out_batches(held, V, config, groups=999, dp_rank=0, dp=1, batch_groups=1))
    result = mean_losses(bigram.token_losses, batches, Layout())

    image = transition[V.first_image :, V.first_image :]
    image = image / image.sum(1, keepdims=True)
    within, uniform = [], np.log(16)
    for batch in batches:
        mask = batch.loss_mask_T & (batch.target_modality_T == IMAGE) & (batch.info.modality_T == IMAGE)
        a, b = batch.tokens_T[mask] - V.first_image, batch.targets_T[mask] - V.first_image
        within += (-np.log(image[a.numpy(), b.numpy()])).tolist()
    # The first of 8 codes is uniform, 7 follow the chain; no bigram model can know that EOI follows the eighth.
    truth = (np.mean(within) + np.log(8 / 7)) * 7 / 8 + uniform / 8
    assert truth < uniform - 0.5
    assert abs(result["eval/loss/image"] - truth) < 0.01
    counts = torch.bincount(torch.cat([b.targets_T[b.loss_mask_T] for b in batches]), minlength=V.size).double()
    text = counts[: V.first_image] / counts[: V.first_image].sum()
    assert result["eval/loss/text"] < -(text * text.clamp_min(1e-9).log()).sum() - 0.3


def test_losses_cover_exactly_the_counted_predictions():
    store = random_store(4, pairs=20, texts=20)
    bigram = Bigram.fit(store, V, data_config())
    for batch in held_out_batches(store, V, data_config(), groups=3, dp_rank=0, dp=1, batch_groups=2):
        losses = bigram.token_losses(batch)
        assert torch.equal(losses > 0, batch.loss_mask_T)


def test_repeated_captions_do_not_fool_the_fit():
    """Every document occurs four times. The smoothing would vanish if fitted on copies of counted documents."""
    rng = np.random.default_rng(0)
    transition = rng.dirichlet(np.full(V.size, 0.5), V.size)
    once, held = chain_store(0, 150, transition), chain_store(1, 300, transition)
    config = data_config(sequence_length=64)
    batches = list(held_out_batches(held, V, config, groups=999, dp_rank=0, dp=1, batch_groups=1))
    plain, repeated = (
        mean_losses(Bigram.fit(store, V, config).token_losses, batches, Layout())["eval/loss/text"]
        for store in (once, MemoryStore(once.documents * 4))
    )
    assert repeated < plain + 0.1


def test_on_real_emoji_it_beats_the_unigram_and_ignores_shuffled_captions(emoji_samples, tmp_path):
    vocabulary = emoji_vocabulary(emoji_samples, tmp_path)
    train, held = (emoji_store(emoji_samples, split, vocabulary) for split in ("train", "validation"))
    config = data_config(sequence_length=512)
    bigram = Bigram.fit(train, vocabulary, config)

    def batches(store):
        return list(held_out_batches(store, vocabulary, config, groups=99, dp_rank=0, dp=1, batch_groups=1))

    result = mean_losses(bigram.token_losses, batches(held), Layout())
    targets = torch.cat([b.targets_T[b.loss_mask_T] for b in batches(held)])
    modality = vocabulary.modality_of[targets]
    for name, m in (("text", TEXT), ("image", IMAGE)):
        share = torch.bincount(targets[modality == m]).double() / (modality == m).sum()
        entropy = -torch.special.xlogy(share, share).sum()  # the loss of the split's own best unigram
        assert result[f"eval/loss/{name}"] < entropy - 0.3
    shuffled = mean_losses(bigram.token_losses, batches(ShuffledCaptions(held)), Layout())
    assert shuffled["eval/loss/image"] == pytest.approx(result["eval/loss/image"], abs=0.05)
