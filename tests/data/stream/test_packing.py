"""Assembly, filling and layout: every rule in packing.py, checked on small and on random documents."""

import itertools

import numpy as np
import pytest
import torch

from moe_dist.core.batch import IMAGE, TEXT
from moe_dist.core.errors import UserError
from moe_dist.data.stream.packing import SHORTEST_PIECE, Assembler, Piece, best_subset, collate, fill_sequence
from tests.support.synthetic_store import MemoryDocument, MemoryStore, SmallVocabulary, random_store

V = SmallVocabulary
CODES = np.array([50, 51, 52])
WORDS = np.array([10, 11, 12, 13])


def assembler(documents, **changes):
    store = documents if isinstance(documents, MemoryStore) else MemoryStore(documents)
    settings = {"seed": 0, "sequence_length": 32, "image_first": 0.5, "caption_dropout": 0.0, **changes}
    return Assembler(store=store, vocabulary=V, **settings)


def piece(length, *, image=0, document=0):
    return Piece(0, document, 0, np.arange(length) + 5, image)


@pytest.mark.parametrize(
    "share, expected",
    [(1.0, [V.bos, V.boi, *CODES, V.eoi, *WORDS, V.eos]), (0.0, [V.bos, *WORDS, V.boi, *CODES, V.eoi, V.eos])],
)
def test_pair_in_either_order(share, expected):
    assert assembler([MemoryDocument(WORDS, CODES)], image_first=share)(0, 0).tokens.tolist() == expected


def test_text_only_and_dropped_caption():
    documents = [MemoryDocument(WORDS, None), MemoryDocument(WORDS, CODES)]
    make = assembler(documents, caption_dropout=1.0)
    assert make(0, 0).tokens.tolist() == [V.bos, *WORDS, V.eos]
    assert make(0, 1).tokens.tolist() == [V.bos, V.boi, *CODES, V.eoi, V.eos]
    assert make(0, 0, start=2).tokens.tolist() == [*WORDS[1:], V.eos]


def test_order_and_dropout_follow_their_shares_and_change_with_epoch_and_seed():
    make = assembler([MemoryDocument(WORDS, CODES)] * 2000, image_first=0.3, caption_dropout=0.2)
    first = [make(0, i).tokens for i in range(2000)]
    assert sum(len(t) == 7 for t in first) / 2000 == pytest.approx(0.2, abs=0.03)
    kept = [t for t in first if len(t) > 7]
    assert sum(t[1] == V.boi for t in kept) / len(kept) == pytest.approx(0.3, abs=0.04)
    again = [make(0, i).tokens for i in range(2000)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    later = [make(1, i).tokens for i in range(2000)]
    other = assembler([MemoryDocument(WORDS, CODES)] * 2000, image_first=0.3, caption_dropout=0.2, seed=-1)
    for changed in (later, [other(0, i).tokens for i in range(2000)]):
        assert not all(np.array_equal(a, b) for a, b in zip(first, changed, strict=True))


def test_every_epoch_draws_one_of_several_captions():
    """Each is drawn equally often, whatever the order and dropout; it depends on seed, epoch and document alone."""
    further = (np.array([20, 21]), np.array([30]))
    pairs, texts = ([MemoryDocument(WORDS, codes, None, further)] * 600 for codes in (CODES, None))
    words = {WORDS.tobytes(): 0, **{caption.tobytes(): n for n, caption in enumerate(further, 1)}}

    def drawn(documents, epoch, **changes):
        make = assembler(documents, **changes)
        pieces = [make(epoch, i).tokens for i in range(600)]
        return [words[p[(p >= V.first_text) & (p < V.first_image)].tobytes()] for p in pieces]

    first = drawn(pairs, 0)
    assert all(first.count(number) / 600 == pytest.approx(1 / 3, abs=0.06) for number in range(3))
    assert first == drawn(pairs, 0) == drawn(texts, 0) == drawn(pairs, 0, image_first=1.0)
    for changed in (drawn(pairs, 1), drawn(pairs, 0, seed=1)):
        assert sum(a == b for a, b in zip(first, changed, strict=True)) / 600 == pytest.approx(1 / 3, abs=0.06)
    assert set(drawn(pairs, 0, every_caption=False)) == {0}


def test_long_caption_is_cut_and_an_image_never():
    long = np.arange(10, 40)
    for share in (0.0, 1.0):
        tokens = assembler([MemoryDocument(long, CODES)], sequence_length=16, image_first=share)(0, 0).tokens.tolist()
        assert len(tokens) == 16
        assert [t for t in tokens if t >= V.first_image] == CODES.tolist()
        assert [t for t in tokens if V.first_text <= t < V.first_image] == long[:9].tolist()
    with pytest.raises(UserError, match=r"data.sequence_length=32 .*64 codes and 4 markers need 68"):
        assembler([MemoryDocument(WORDS, np.full(64, 50))])(0, 0)


@pytest.mark.parametrize("seed", range(200))
def test_best_subset_equals_brute_force(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 20, rng.integers(1, 9)).tolist()
    room = int(rng.integers(1, 50))
    subsets = [s for n in range(len(lengths) + 1) for s in itertools.combinations(range(len(lengths)), n)]
    sums = [sum(lengths[i] for i in s) for s in subsets if lengths[0] > room or 0 in s]
    chosen = best_subset(lengths, room)
    assert len(set(chosen)) == len(chosen)
    assert sum(lengths[i] for i in chosen) == max(s for s in sums if s <= room)
    assert lengths[0] > room or 0 in chosen


def test_fill_prefers_whole_documents_and_cuts_text_only_for_what_is_left():
    pending = [piece(10, document=0), piece(30, document=1), piece(6, document=2)]
    taken = fill_sequence(pending, 16)
    assert [(p.document, len(p)) for p in taken] == [(0, 10), (2, 6)]
    assert [(p.document, len(p)) for p in pending] == [(1, 30)]
    taken = fill_sequence(pending, 16)
    assert [(p.document, p.start, len(p)) for p in taken] == [(1, 0, 16)]
    assert [(p.document, p.start, len(p)) for p in pending] == [(1, 16, 14)]


def test_fill_never_cuts_a_pair_nor_leaves_one_token():
    assert fill_sequence([piece(20, image=6)], 16) == []
    pending = [piece(17)]
    assert [len(p) for p in fill_sequence(pending, 16)] == [15] and len(pending[0]) == 2
    pending = [piece(10), piece(30)]
    assert [len(p) for p in fill_sequence(pending, 10 + SHORTEST_PIECE - 1)] == [10]
    assert fill_sequence([], 16) == []


def test_collate_by_hand():
    text = Piece(0, 0, 0, np.array([V.bos, 10, 11, V.eos]), 0)
    pair = Piece(0, 1, 0, np.array([V.bos, V.boi, 50, V.eoi, V.eos]), 1)
    batch = collate([(3, [[text], [pair, text]]), (7, [[], [text, text]])], V, 10, instructions=False)
    info = batch.info
    assert info.document_lengths == (4, 6, 5, 4, 1, 10, 4, 4, 2)
    assert batch.tokens_T[10:20].tolist() == [*pair.tokens, *text.tokens, V.pad]
    assert batch.targets_T[10:19].tolist() == [*pair.tokens[1:], V.pad, *text.tokens[1:], V.pad]
    assert batch.loss_mask_T[10:20].tolist() == [1, 1, 1, 1, 0, 1, 1, 1, 0, 0]
    assert batch.target_modality_T[10:15].tolist() == [TEXT, IMAGE, TEXT, TEXT, TEXT]
    assert info.modality_T[10:15].tolist() == [TEXT, TEXT, IMAGE, TEXT, TEXT]
    assert info.position_T[10:20].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0]
    assert info.token_id_T.tolist() == [*range(60, 80), *range(140, 160)]
    assert info.valid_T.sum() == 4 + 9 + 8
    assert info.modality_counts == ((12, 8), (1, 0))
    assert int(batch.loss_mask_T.sum()) == 3 + 4 + 3 + 3 + 3


@pytest.mark.parametrize("seed", range(20))
def test_collate_properties_on_random_documents(seed):
    store = random_store(seed, pairs=30, texts=30)
    make = assembler(store)
    pending = [make(0, i) for i in range(len(store))]
    sequences = [fill_sequence(pending, 32) for _ in range(8)]
    batch = collate([(0, sequences[:4]), (1, sequences[4:])], V, 32, instructions=False)
    info = batch.info
    assert sum(info.document_lengths) == 256 == info.num_tokens
    boundaries = np.cumsum(info.document_lengths)
    assert set(range(32, 257, 32)) <= set(boundaries.tolist())  # no document crosses a sequence
    starts = torch.tensor([0, *boundaries[:-1]])
    assert torch.equal(info.position_T, torch.arange(256) - starts[info.document_T])
    inner = torch.cat([info.document_T[1:] == info.document_T[:-1], torch.tensor([False])])
    assert torch.equal(batch.loss_mask_T, inner & info.valid_T)
    where = batch.loss_mask_T.nonzero().squeeze(1)
    assert torch.equal(batch.targets_T[where], batch.tokens_T[where + 1])
    assert torch.equal(info.valid_T, batch.tokens_T != V.pad)
    assert torch.equal(info.modality_T == IMAGE, batch.tokens_T >= V.first_image)
