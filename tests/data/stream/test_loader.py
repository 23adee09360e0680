"""The loader: the same order of groups for any number of ranks, exact resume, errors that surface; held-out batches."""

import json
import subprocess
import sys
import threading
from dataclasses import fields
from itertools import islice

import numpy as np
import pytest
import torch

from moe_dist.checkpoint.train_state import merge_states
from moe_dist.core.batch import IMAGE
from moe_dist.core.errors import UserError
from moe_dist.data.stream.held_out_batches import ShuffledCaptions, held_out_batches
from moe_dist.data.stream.loader import make_loader
from tests.support.synthetic_store import MemoryDocument, MemoryStore, SmallVocabulary, data_config, random_store

STORE = random_store(7, pairs=60, texts=50, text=100, captions=3)


def loader(rank=0, dp=1, *, groups=1, state=None, store=STORE, seed=5, device="cpu", **data):
    return make_loader(
        store,
        SmallVocabulary,
        data_config(**data),
        seed=seed,
        dp_rank=rank,
        dp=dp,
        batch_groups=groups,
        state=state,
        device=torch.device(device),
    )


def tensors(batch):
    values = {f.name: getattr(batch, f.name) for f in fields(batch)} | {
        f.name: getattr(batch.info, f.name) for f in fields(batch.info)
    }
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def assert_same(a, b):
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
    assert a.info.document_lengths == b.info.document_lengths and a.info.modality_counts == b.info.modality_counts


def global_groups(dp, batches, *, groups=1, state=None, **data):
    """Return the tokens of every group by its global number, and the merged state after each micro-batch."""
    loaders = [loader(rank, dp, groups=groups, state=state, **data) for rank in range(dp)]
    by_number, states = {}, []
    for _ in range(batches):
        items = [next(one) for one in loaders]
        states.append(json.loads(json.dumps(merge_states([item.state for item in items]))))
        for batch, *_ in items:
            size = batch.info.num_tokens // groups
            for at in range(0, batch.info.num_tokens, size):
                first = int(batch.info.token_id_T[at])
                assert first % size == 0 and first // size not in by_number
                assert batch.info.token_id_T[at : at + size].tolist() == list(range(first, first + size))
                by_number[first // size] = batch.tokens_T[at : at + size].tolist()
    return by_number, states


@pytest.mark.parametrize("fraction", [None, 0.15])
def test_one_two_and_four_ranks_read_the_same_groups(fraction):
    one, states = global_groups(1, 96, image_fraction=fraction)
    assert sorted(one) == list(range(96))
    assert len({str(tokens) for tokens in one.values()}) > 80  # a long text fills whole groups in every epoch
    for dp, groups in [(1, 4), (2, 1), (2, 3), (4, 1), (4, 2)]:
        other, other_states = global_groups(dp, 96 // (dp * groups), groups=groups, image_fraction=fraction)
        assert other == one
        assert other_states[-1] == states[-1]


def test_rank_and_lane_of_a_group():
    batch = next(loader(1, 2, groups=3)).batch
    size = batch.info.num_tokens // 3
    assert (batch.info.token_id_T[::size] // size).tolist() == [1, 3, 5]
    assert batch.info.num_groups == 3


@pytest.mark.parametrize("seed", range(4))
def test_resume_at_any_batch_equals_the_uninterrupted_run(seed):
    store = random_store(seed, pairs=17, texts=13, text=90, captions=3)  # several epochs
    whole = list(islice(loader(store=store, seed=seed), 40))
    assert whole[-1].state["lanes"]["0"]["all"]["epoch"] >= 2
    for stop in range(0, 30):
        resumed = loader(store=store, seed=seed, state=json.loads(json.dumps(whole[stop].state)))
        for (batch, state, _), (expected, expected_state, _) in zip(
            islice(resumed, 5), whole[stop + 1 :], strict=False
        ):
            assert_same(batch, expected)
            assert state == expected_state


def test_states_are_values_that_reading_ahead_does_not_touch():
    source = loader()
    items = [next(source) for _ in range(6)]
    texts = [json.dumps(item.state) for item in items]
    list(islice(source, 20))
    assert [json.dumps(item.state) for item in items] == texts
    assert len(set(texts)) == 6


@pytest.mark.parametrize("before, after", [(1, 2), (2, 4), (4, 2), (4, 1), (2, 1)])
@pytest.mark.parametrize("batches", [1, 3, 7])
def test_another_number_of_ranks_continues_the_sequence(before, after, batches):
    reference, _ = global_groups(1, 100)
    first, states = global_groups(before, batches)
    second, _ = global_groups(after, 12, state=states[-1])
    assert sorted(first) == list(range(batches * before))
    assert sorted(second) == list(range(batches * before, batches * before + 12 * after))
    assert first | second == {n: reference[n] for n in range(batches * before + 12 * after)}


def test_states_of_different_moments_do_not_merge():
    ranks = [loader(rank, 2) for rank in range(2)]
    early = next(ranks[0]).state
    next(ranks[1])
    late = next(ranks[1]).state
    with pytest.raises(RuntimeError, match=r"disagree on .*groups"):
        merge_states([early, late])


def test_bad_counts_are_named():
    with pytest.raises(UserError, match=r"data.lanes=4 is not a multiple of the 3 data-parallel ranks"):
        loader(0, 3)
    with pytest.raises(UserError, match=r"data.sequence_length=8 cannot hold an image: its 6 codes .* need 10"):
        loader(sequence_length=8)
    with pytest.raises(UserError, match=r"data.sequence_length=4 is below"):
        loader(sequence_length=4)


def test_a_state_of_other_data_is_refused():
    state = next(loader()).state
    with pytest.raises(UserError, match=r"saved with documents=110, this run has documents=9"):
        loader(store=random_store(0, texts=9), state=state)
    with pytest.raises(UserError, match=r"saved with data.lanes=4, this run has data.lanes=8"):
        loader(lanes=8, state=state)
    with pytest.raises(UserError, match=r"saved with seed=5, this run has seed=6"):
        loader(seed=6, state=state)


@pytest.mark.parametrize(("names", "named"), [([], "a shard"), (["a.tar", "b.tar"], "a.tar, b.tar")])
def test_a_state_of_shards_with_another_content_is_refused(names, named):
    store, state = random_store(7, pairs=60), next(loader(store=random_store(7, pairs=60))).state
    loader(store=store, state=state)
    before = state["of"].pop("shards")
    loader(store=store, state=state)  # a state from before the digest was saved
    state["of"]["shards"] = before + "other"
    store.replaced = lambda: names
    with pytest.raises(UserError, match=rf"not those of the saved loader state: {named} was replaced by another"):
        loader(store=store, state=state)


class BrokenStore(MemoryStore):
    def document(self, index, choice=0):
        if index == 70:
            raise OSError("the disk is gone")
        return super().document(index, choice)


def test_an_error_in_the_thread_is_raised_by_next_again_and_again():
    source = loader(store=BrokenStore(STORE.documents))
    with pytest.raises(OSError, match="the disk is gone"):
        list(islice(source, 1000))
    with pytest.raises(OSError, match="the disk is gone"):
        next(source)


def test_a_process_ends_while_the_loader_reads_ahead():
    script = "from tests.data.stream.test_loader import loader; next(loader()); raise SystemExit(3)"
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 3


# --- held-out batches -------------------------------------------------------------------------------------------------


def heldout(rank=0, dp=1, *, groups=100, batch_groups=1, store=STORE, **data):
    config = data_config(**data)
    return list(
        held_out_batches(store, SmallVocabulary, config, groups=groups, dp_rank=rank, dp=dp, batch_groups=batch_groups)
    )


def test_held_out_reads_every_document_once_with_its_caption():
    batches = heldout(caption_dropout=0.9)
    tokens = sum(int(b.info.valid_T.sum()) for b in batches)
    assert tokens == STORE.lengths.sum() + 2 * len(STORE) + 2 * STORE.has_image.sum()


@pytest.mark.parametrize("groups", [5, 100])
def test_held_out_is_the_same_at_every_layout(groups):
    def groups_of(batches):
        found = {}
        for batch in batches:
            size = 64
            for at in range(0, batch.info.num_tokens, size):
                if batch.info.valid_T[at : at + size].any():
                    found[int(batch.info.token_id_T[at]) // size] = batch.tokens_T[at : at + size].tolist()
        return found

    one = groups_of(heldout(groups=groups))
    assert len(one) == 5 if groups == 5 else 30 < len(one) < 100
    for dp, batch_groups in [(1, 3), (2, 1), (3, 2), (4, 4), (7, 1)]:
        ranks = [heldout(rank, dp, groups=groups, batch_groups=batch_groups) for rank in range(dp)]
        assert len({len(batches) for batches in ranks}) == 1  # the same number of forward passes on every rank
        assert len({sum(b.info.num_groups for b in batches) for batches in ranks}) == 1
        assert {n: t for batches in ranks for n, t in groups_of(batches).items()} == one


def test_held_out_without_documents():
    with pytest.raises(UserError, match="held-out split holds no documents"):
        heldout(store=MemoryStore([]))


def test_shuffled_captions_are_a_derangement_of_nearly_equal_lengths():
    rng = np.random.default_rng(0)
    captions = [rng.integers(5, 45, rng.integers(3, 20)) for _ in range(50)]
    documents = [MemoryDocument(captions[i % 50], rng.integers(45, 61, 6)) for i in range(150)]
    documents.insert(10, MemoryDocument(captions[0], None))
    store = MemoryStore(documents)
    mixed = ShuffledCaptions(store)
    before = [d.text.tobytes() for i, d in enumerate(documents) if i != 10]
    after = [mixed.document(i).text.tobytes() for i in range(151) if i != 10]
    assert all(a != b for a, b in zip(before, after, strict=True))
    assert sorted(before) == sorted(after)
    assert all(np.array_equal(mixed.document(i).image, d.image) for i, d in enumerate(documents) if i != 10)
    assert mixed.document(10) is documents[10]
    assert mixed.lengths.tolist() == MemoryStore([mixed.document(i) for i in range(151)]).lengths.tolist()
    assert np.median(np.abs(mixed.lengths - store.lengths)) <= 1
    images = [sum(int((b.target_modality_T == IMAGE).sum()) for b in heldout(store=s)) for s in (store, mixed)]
    assert images[0] == images[1] == 150 * 6


def test_captions_that_are_all_alike_cannot_be_shuffled():
    same = [MemoryDocument(np.array([10, 11]), np.full(6, 50)) for _ in range(4)]
    with pytest.raises(UserError, match="4 of 4 held-out pairs share one caption"):
        ShuffledCaptions(MemoryStore(same))


def test_batches_for_a_gpu_are_pinned_by_the_loaders_thread(monkeypatch):
    """Page-locked memory needs CUDA, so a stand-in copies the tensors and records the calling thread."""
    threads, devices, pinned = [], [], set()

    def pin_memory(tensor):
        threads.append(threading.current_thread().name)
        copy = tensor.clone()
        pinned.add(copy.data_ptr())
        kept.append(copy)
        return copy

    kept = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    for (batch, state, _), (plain, its_state, _) in zip(islice(loader(device="cuda:3"), 3), loader()):
        assert_same(batch, plain)
        assert state == its_state
        assert all(tensor.data_ptr() in pinned for tensor in tensors(batch).values())
    assert set(threads) == {"loader_0"} and devices == [torch.device("cuda", 3)]


def test_the_loader_of_a_cpu_calls_nothing_of_cuda(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", None)
    monkeypatch.setattr(torch.cuda, "set_device", None)
    next(loader())
