"""Mixing of corpora by weight, against a naive loop; resume; number of ranks."""

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from moe_dist.checkpoint.train_state import merge_states
from moe_dist.core.errors import UserError
from moe_dist.data.stream.held_out_batches import whole_captions
from moe_dist.data.stream.lanes import make_lanes
from moe_dist.data.stream.loader import make_loader
from tests.data.tasks.test_instructions import values
from tests.support.synthetic_store import MemoryStore, SmallVocabulary, data_config, random_instructions, random_store

V = SmallVocabulary
SIZES = (10, 30, 60)


def weighted(weights, lanes=2, **changes):
    entries = [f"{i}" for i in range(len(weights))]
    return data_config(shards=entries, weights=list(weights), lanes=lanes, **changes)


def store_of(sizes=SIZES):
    plain = random_store(2, texts=sum(sizes[:-1]), text=20).documents
    return MemoryStore([*plain, *random_instructions(0, count=sizes[-1])], sizes)


def documents(store, data, count):
    """Return the first documents that each lane reads, as (epoch, document)."""
    found = []
    for lane in make_lanes(whole_captions(store, V, data), data, numbers=range(data.lanes), lanes=data.lanes).values():
        read = []
        while len(read) < count:
            pending = lane._stream.refill()
            read += [(piece.epoch, piece.document) for piece in pending]
            pending.clear()
        found.append(read[:count])
    return found


@pytest.mark.parametrize("weights", [(3, 1, 1), (1, 1, 1), (0.2, 0.5, 0.3), (1, 100, 7)])
def test_every_beginning_of_a_lane_has_the_weights(weights):
    corpus = np.repeat(np.arange(3), SIZES)
    for read in documents(store_of(), weighted(weights), 600):
        drawn = [0, 0, 0]
        for number, (_, document) in enumerate(read, 1):
            naive = min(range(3), key=lambda i: ((drawn[i] + 0.5) / weights[i], i))
            assert corpus[document] == naive
            drawn[naive] += 1
            shares = np.array(weights) / sum(weights) * number
            assert np.abs(drawn - shares).max() < 2


def test_each_corpus_has_its_own_epochs_in_new_orders():
    for read in documents(store_of(), weighted((3, 1, 1)), 300):
        for first, size in ((0, 5), (10, 15), (40, 30)):
            mine = [pair for pair in read if first <= pair[1] < first + 2 * size]
            for epoch in range(mine[-1][0]):
                of_epoch = [document for number, document in mine if number == epoch]
                assert len(of_epoch) == len(set(of_epoch)) == size, "every document once in an epoch"
        orders = [[d for e, d in read if e == epoch and d < 10] for epoch in range(3)]
        assert orders[0] != orders[1] != orders[2]


def loader(rank=0, dp=1, groups=2, state=None, weights=(3, 1, 2)):
    data = weighted(weights, lanes=4)
    return make_loader(store_of(), V, data, seed=3, dp_rank=rank, dp=dp, batch_groups=groups, state=state)


def test_resume_is_bitwise():
    whole = list(islice(loader(), 40))
    assert whole[-1].state["lanes"]["0"]["all"]["orders"][0]["epoch"] >= 2
    for stop in (0, 7, 20):
        resumed = loader(state=json.loads(json.dumps(whole[stop].state)))
        for item, expected in zip(islice(resumed, 5), whole[stop + 1 :], strict=False):
            assert values(item.batch) == values(expected.batch) and item.state == expected.state


def test_ranks_read_what_one_rank_reads_and_resume_at_another_number():
    def groups_of(dp, count, state=None):
        ranks, found = [loader(rank, dp, 1, state) for rank in range(dp)], {}
        for _ in range(count // dp):
            items = [next(rank) for rank in ranks]
            for batch, *_ in items:
                found[int(batch.info.token_id_T[0])] = values(batch)
        return found, merge_states([item.state for item in items])

    one, last = groups_of(1, 16)
    for before, after in ((2, 4), (4, 1), (1, 2)):
        first, state = groups_of(before, 8)
        second, merged = groups_of(after, 8, json.loads(json.dumps(state)))
        assert first | second == one and merged == last


def test_other_weights_are_refused_on_resume():
    state = json.loads(json.dumps(next(loader()).state))
    with pytest.raises(UserError, match=r"saved with data\.weights=\[3\.0, 1\.0, 2\.0\], this run has .*\[1\.0, 1\.0"):
        loader(state=state, weights=(1, 1, 1))


def test_held_out_passes_ignore_the_weights():
    data = weighted((3, 1, 1), lanes=1)
    lane = make_lanes(whole_captions(store_of(), V, data), data, numbers=[0], lanes=1, epochs=1)[0]
    counts = Counter()
    while any(group := lane.next_group()):
        counts.update(piece.document for sequence in group for piece in sequence if not piece.start)
    assert counts == Counter(range(100))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [1, 2]}, "weights has 2 entries, but shards has 3"),
        ({"weights": [1, 0, 1]}, r"key 'data\.weights\.1': input should be greater than 0"),
        ({"weights": [1, 1, 1], "image_fraction": 0.5}, "weights and image_fraction cannot be combined"),
        ({"shards": "a", "weights": [1, 1]}, "weights has 2 entries, but shards has 1"),
        ({"validation_fraction": 0.0}, r"key 'data\.validation_fraction': "),
    ],
)
def test_wrong_weights_are_named(change, message):
    with pytest.raises(UserError, match=message):
        data_config(**{"shards": ["a", "b", "c"], **change})


def test_an_entry_with_fewer_samples_than_lanes_is_named():
    data = weighted((1, 1, 1), lanes=16)
    with pytest.raises(UserError, match=r"data\.lanes=16 needs at least as many samples in entry 1 of data\.shards"):
        make_lanes(whole_captions(store_of(), V, data), data, numbers=[0], lanes=16)


def test_corpora_of_one_size_are_read_in_different_orders():
    read = documents(store_of((20, 20)), weighted((1, 1), lanes=1), 40)[0]
    first, second = ([d % 20 for _, d in read if d // 20 == corpus] for corpus in range(2))
    assert sorted(first) == sorted(second) and first != second
