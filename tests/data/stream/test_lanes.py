"""Lanes: complete epochs, a new order each epoch, the steered image fraction, and the state."""

import json
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest

from moe_dist.core.errors import UserError
from moe_dist.data.stream.lanes import Stream, make_lanes
from moe_dist.data.stream.packing import Assembler
from tests.support.synthetic_store import SmallVocabulary, data_config, random_store


def make(store, data, *, seed=0, lanes=None, **options):
    assembler = Assembler(
        store=store,
        vocabulary=SmallVocabulary,
        seed=seed,
        sequence_length=data.sequence_length,
        image_first=data.image_first,
        caption_dropout=data.caption_dropout,
    )
    lanes = lanes or data.lanes
    return assembler, make_lanes(assembler, data, numbers=range(lanes), lanes=lanes, **options)


def signature(group):
    return [[(p.epoch, p.document, p.start, p.tokens.tolist()) for p in sequence] for sequence in group]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("fraction", [None, 0.2])
def test_no_token_is_lost_or_doubled_within_an_epoch(seed, fraction):
    """In three epochs of every lane, each document's pieces join to exactly its assembled tokens, in order."""
    data = data_config(image_fraction=fraction)
    store = random_store(seed, pairs=20 + seed, texts=25 + seed, text=90)
    assembler, lanes = make(store, data, seed=seed)
    seen = set()
    for lane in lanes.values():
        pieces = defaultdict(list)
        latest = 0
        for _ in range(120):
            for sequence in lane.next_group():
                assert sum(map(len, sequence)) <= data.sequence_length
                for piece in sequence:
                    pieces[piece.epoch, piece.document].append(piece)
                    latest = max(latest, piece.epoch)
        assert latest >= 3
        documents = {document for epoch, document in pieces if epoch == 0}
        assert not documents & seen
        seen |= documents
        assert {document for epoch, document in pieces if epoch == 1} == documents
        for (epoch, document), parts in pieces.items():
            assert parts[0].start == 0 and all(b.start == a.start + len(a) for a, b in pairwise(parts))
            whole = assembler(epoch, document).tokens
            joined = np.concatenate([p.tokens for p in parts])
            if epoch < 2:
                assert len(joined) == len(whole)
            assert np.array_equal(joined, whole[: len(joined)])
    assert seen == set(range(len(store)))


def test_lanes_of_unequal_length_wrap_on_their_own():
    _, lanes = make(random_store(0, pairs=45, texts=45), data_config())
    sizes, orders = [], []
    for lane in lanes.values():
        pieces = [p for _ in range(60) for sequence in lane.next_group() for p in sequence]
        by_epoch = defaultdict(dict)
        for p in pieces:
            by_epoch[p.epoch][p.document] = True
        assert max(by_epoch) > 3
        orders.append([list(by_epoch[epoch]) for epoch in range(3)])
        sizes.append(len(by_epoch[0]))
    assert sizes == [23, 23, 22, 22]
    for epochs in orders:
        assert all(set(epoch) == set(epochs[0]) for epoch in epochs)


def test_every_epoch_and_seed_has_its_own_order():
    def order(seed):
        assembler, _ = make(random_store(0, pairs=10, texts=10), data_config(), seed=seed)
        stream = Stream(np.arange(20), assembler, lane=0)
        return [stream.refill().pop(0).document for _ in range(60)]

    epochs = [order(0)[start : start + 20] for start in (0, 20, 40)] + [order(1)[:20]]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("fraction", [None, 0.15])
def test_state_is_compact_json_and_continues_exactly(fraction):
    data = data_config(image_fraction=fraction)
    store = random_store(3, pairs=40, texts=40, text=200)
    _, lanes = make(store, data)
    for lane in lanes.values():
        for _ in range(7):
            lane.next_group()
        text = json.dumps(lane.state())
        assert len(text) < 3000
        expected = [signature(lane.next_group()) for _ in range(9)]
        _, fresh = make(store, data)
        number = next(n for n, other in lanes.items() if other is lane)
        fresh[number].restore(json.loads(text))
        assert [signature(fresh[number].next_group()) for _ in range(9)] == expected


def test_a_finite_lane_gives_one_epoch_and_then_empty_groups():
    data = data_config()
    store = random_store(5, pairs=10, texts=10)
    assembler, lanes = make(store, data, lanes=1, epochs=1)
    total = 0
    while any(group := lanes[0].next_group()):
        total += sum(len(p) for sequence in group for p in sequence)
    assert total == sum(len(assembler(0, i)) for i in range(len(store)))
    assert not any(lanes[0].next_group())


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.3, 0.35])
@pytest.mark.parametrize("text", [5, 300])
def test_every_group_keeps_to_the_image_fraction(fraction, text):
    """Image tokens are at most half an image above their fraction of all positions or below that of valid ones."""
    data = data_config(sequence_length=96, group_sequences=4, image_fraction=fraction, caption_dropout=0.0)
    store = random_store(1, pairs=300, texts=300, codes=8, caption=12, text=text)
    _, lanes = make(store, data)
    shares, padding = [], []
    for lane in lanes.values():
        for _ in range(50):
            pieces = [p for sequence in lane.next_group() for p in sequence]
            tokens = sum(map(len, pieces))
            image = sum(p.image_tokens for p in pieces)
            assert fraction * tokens - 4 <= image <= fraction * 4 * 96 + 4
            shares.append(image / tokens)
            padding.append(1 - tokens / (96 * 4))
    assert np.mean(shares) == pytest.approx(fraction, abs=0.02)
    assert np.mean(padding) < 0.06


def test_image_fraction_out_of_reach_is_refused_with_the_range():
    with pytest.raises(UserError, match=r"data.image_fraction=0.9 cannot be met: .* 0 to 0\.\d\d\d"):
        make(random_store(0, pairs=20, texts=20), data_config(image_fraction=0.9))
    with pytest.raises(UserError, match=r"data.image_fraction=0.3 cannot be met: without text-only documents"):
        make(random_store(0, pairs=20), data_config(image_fraction=0.3))
    with pytest.raises(UserError, match=r"data.image_fraction=0.3 cannot be met: .* 0 to 0\.000"):
        make(random_store(0, texts=20), data_config(image_fraction=0.3))


def test_too_few_documents_for_the_lanes():
    with pytest.raises(UserError, match=r"data.lanes=4 needs at least as many documents, the shards hold 3"):
        make(random_store(0, texts=3), data_config())
    with pytest.raises(UserError, match=r"data.lanes=4 needs at least as many image-text pairs, the shards hold 2"):
        make(random_store(0, pairs=2, texts=9), data_config(image_fraction=0.1))
