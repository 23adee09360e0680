"""Instructions from the document to the batch: layout, loss mask and sidecar compared with loops; mixing; resume."""

import json
from itertools import islice

import numpy as np
import pytest
import torch

from moe_dist.checkpoint.train_state import merge_states
from moe_dist.data.stream.held_out_batches import ShuffledCaptions, held_out_batches
from moe_dist.data.stream.lanes import make_lanes
from moe_dist.data.stream.loader import make_loader
from moe_dist.data.stream.packing import Assembler, fill_sequence
from tests.support.synthetic_store import MemoryStore, SmallVocabulary, data_config, random_instructions, random_store

V = SmallVocabulary


def mixed_store(seed=0, count=60):
    """Return a store of two corpora: captions and texts, then instructions."""
    plain = random_store(seed, pairs=20, texts=20, text=70).documents
    return MemoryStore([*plain, *random_instructions(seed, count=count)], [40, count])


STORE = mixed_store()


def laid_out(document):
    """Lay out an instruction id by id: all its ids, and for each id whether it is predicted."""
    ids, learnt = [V.bos], [False]
    if document.image is not None:
        for code in [V.boi, *document.image, V.eoi]:
            ids.append(int(code))
            learnt.append(False)
    for place, token in enumerate(document.text):
        ids.append(int(token))
        learnt.append(place >= document.prompt.length)
    return [*ids, V.eos], [*learnt, True]


def instructions_of(store):
    """Map the ids of each instruction to its document."""
    return {tuple(laid_out(d)[0]): d for d in store.documents if d.prompt is not None}


def loader(store=STORE, *, rank=0, dp=1, groups=2, state=None, **data):
    return make_loader(store, V, data_config(**data), seed=3, dp_rank=rank, dp=dp, batch_groups=groups, state=state)


def check_against_the_loops(batch, store):
    """Compare every position of a batch with its documents. Returns the instructions found."""
    known, met, at = instructions_of(store), [], 0
    domain_T, ends, samples = [], [], []
    for length in batch.info.document_lengths:
        ids = tuple(batch.tokens_T[at : at + length].tolist())
        mask = batch.loss_mask_T[at : at + length].tolist()
        document = known.get(ids)
        if document is None:
            assert mask == [bool(batch.info.valid_T[at])] * (length - 1) + [False], "every token of a plain text counts"
            domain_T += [-1] * length
        else:
            _, learnt = laid_out(document)
            assert mask == [*learnt[1:], False], "the prediction of answer and EOS counts, and no other"
            assert batch.targets_T[at : at + length - 1].tolist() == list(ids[1:])
            domain_T += [store.domains.index(document.prompt.domain)] * length
            ends.append(at + learnt.index(True) - 1)
            samples.append(document.prompt.sample)
            met.append(document.prompt.sample)
        at += length
    assert batch.sidecar["domain_T"].tolist() == domain_T
    assert batch.sidecar["prompt_end_S"].tolist() == ends
    assert batch.sidecar["sample_S"].tolist() == samples
    assert all(value.dtype == torch.int64 for value in batch.sidecar.values())
    return met


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("fraction", [None, 0.1])
def test_batches_equal_the_loops_and_every_instruction_comes_whole(seed, fraction):
    store = mixed_store(seed)
    batches = held_out_batches(
        store, V, data_config(image_fraction=fraction), groups=1000, dp_rank=0, dp=1, batch_groups=2
    )
    met = [sample for batch in batches for sample in check_against_the_loops(batch, store)]
    expected = [d.prompt.sample for d in store.documents if d.prompt]
    if fraction is None:
        assert sorted(met) == expected, "one pass reads each instruction once, and none in pieces"
    else:
        assert len(set(met)) == len(met) > 20
    assert len(expected) == 60


@pytest.mark.parametrize("seed", range(3))
def test_training_batches_equal_the_loops_too(seed):
    store = mixed_store(seed)
    met = [sample for batch, *_ in islice(loader(store), 40) for sample in check_against_the_loops(batch, store)]
    assert len(set(met)) == 60


def test_an_image_comes_before_the_prompt_and_the_answer_is_never_dropped():
    store = mixed_store()
    make = Assembler(store=store, vocabulary=V, seed=0, sequence_length=32, image_first=0.0, caption_dropout=1.0)
    for number, document in enumerate(store.documents):
        if document.prompt is not None:
            assert make(0, number).tokens.tolist() == laid_out(document)[0]


def test_an_instruction_moves_to_the_next_sequence_rather_than_being_cut():
    store = MemoryStore(random_instructions(0, count=1, pictures=0.0))
    make = Assembler(store=store, vocabulary=V, seed=0, sequence_length=32, image_first=0.5, caption_dropout=0.0)
    piece = make(0, 0)
    pending = [piece]
    assert fill_sequence(pending, len(piece) - 1) == [] and pending == [piece]
    assert fill_sequence(pending, len(piece)) == [piece] and not pending


def test_a_batch_without_an_instruction_has_empty_lists_and_other_data_no_sidecar():
    plain = random_store(0, pairs=4, texts=4)
    batch = next(loader(plain, groups=1)).batch
    assert batch.sidecar == {}
    one = MemoryStore([*plain.documents, *random_instructions(0, count=1)])
    sizes = {len(batch.sidecar["sample_S"]) for batch, *_ in islice(loader(one, groups=1), 8)}
    assert 0 in sizes and sizes - {0}


def values(batch):
    info = {name: getattr(batch.info, name).tolist() for name in ("valid_T", "position_T", "token_id_T")}
    own = {name: getattr(batch, name).tolist() for name in ("tokens_T", "targets_T", "loss_mask_T")}
    return own | info | {name: value.tolist() for name, value in batch.sidecar.items()}


@pytest.mark.parametrize("fraction", [None, 0.1])
def test_resume_is_bitwise_with_the_sidecar(fraction):
    whole = list(islice(loader(image_fraction=fraction), 30))
    assert whole[-1].state["lanes"]["0"]["all" if fraction is None else "texts"]["epoch"] >= 1
    for stop in range(0, 24, 3):
        resumed = loader(state=json.loads(json.dumps(whole[stop].state)), image_fraction=fraction)
        for (batch, state, _), (expected, expected_state, _) in zip(
            islice(resumed, 5), whole[stop + 1 :], strict=False
        ):
            assert values(batch) == values(expected)
            assert state == expected_state


def by_token_id(dp, batches):
    """Return the sample by global token id, for every instruction's last prompt token, and the merged state."""
    ranks, found = [loader(rank=rank, dp=dp, groups=1) for rank in range(dp)], {}
    for _ in range(batches):
        items = [next(rank) for rank in ranks]
        for batch, *_ in items:
            ids = batch.info.token_id_T[batch.sidecar["prompt_end_S"]].tolist()
            found |= dict(zip(ids, batch.sidecar["sample_S"].tolist(), strict=True))
    return found, merge_states([item.state for item in items])


def test_samples_are_the_same_at_every_number_of_ranks():
    one, state = by_token_id(1, 16)
    assert len(one) > 30
    for dp in (2, 4):
        assert by_token_id(dp, 16 // dp) == (one, state)


def test_shuffled_captions_keep_prompt_and_answer_together():
    store = MemoryStore(random_instructions(1, count=40, pictures=1.0))
    mixed = ShuffledCaptions(store)
    texts = {d.text.tobytes(): d.prompt for d in store.documents}
    for number, document in enumerate(store.documents):
        other = mixed.document(number)
        assert other.text.tobytes() != document.text.tobytes()
        assert other.prompt == texts[other.text.tobytes()]
        assert np.array_equal(other.image, document.image)


# ------------------------------------------------------------------------------------------------------ mixing corpora


def documents_of_lanes(store, lanes, epochs=1):
    data = data_config(lanes=lanes)
    make = Assembler(store=store, vocabulary=V, seed=0, sequence_length=32, image_first=0.5, caption_dropout=0.0)
    found = []
    for lane in make_lanes(make, data, numbers=range(lanes), lanes=lanes, epochs=epochs).values():
        documents = []
        while any(group := lane.next_group()):
            documents += [piece.document for sequence in group for piece in sequence if piece.start == 0]
        found.append(documents)
    return found


@pytest.mark.parametrize(("sizes", "lanes"), [((40, 60), 4), ((3, 97), 4), ((5, 5, 6), 8), ((50, 1, 49), 7)])
def test_every_lane_has_its_share_of_every_corpus(sizes, lanes):
    plain = random_store(2, texts=sum(sizes)).documents
    found = documents_of_lanes(MemoryStore(plain, sizes), lanes)
    assert sorted(number for lane in found for number in lane) == list(range(sum(sizes)))
    assert max(map(len, found)) - min(map(len, found)) <= 1
    corpus = np.repeat(np.arange(len(sizes)), sizes)
    for number, size in enumerate(sizes):
        shares = [sum(corpus[document] == number for document in lane) for lane in found]
        assert max(shares) - min(shares) <= 1 and sum(shares) == size


def test_a_lane_reads_its_corpora_mixed_and_not_one_after_the_other():
    plain = random_store(2, texts=200).documents
    for lane in documents_of_lanes(MemoryStore(plain, [100, 100]), 4):
        first_half = [document < 100 for document in lane[: len(lane) // 2]]
        assert 0.25 < np.mean(first_half) < 0.75
