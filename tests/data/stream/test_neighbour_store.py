"""The neighbour store: the tensors that it adds to a batch, and its errors."""

from dataclasses import replace

import pytest
import torch

from moe_dist.config.losses import NeighbourSettings
from moe_dist.core.errors import UserError
from moe_dist.data.stream.loader import make_loader
from moe_dist.data.stream.neighbour_store import (
    AverageNeighbours,
    Neighbours,
    NeighbourStore,
    Samples,
    read_samples,
    write_neighbours,
    write_samples,
)
from tests.support.model_batches import make_batch
from tests.support.synthetic_store import MemoryStore, SmallVocabulary, data_config, random_instructions

ABOUT = {"model": "digest", "checkpoint": "runs/x/checkpoints/step_00000008", "data": {}}
SAMPLES = Samples(
    sample_N=torch.tensor([5, 17, 2**62]), right_N=torch.tensor([True, False, True]), routing_NR=torch.rand(3, 4)
)
NEIGHBOURS = Neighbours(
    neighbour_NK=torch.tensor([[2, 0], [0, 2], [0, 0]]), weight_NK=torch.tensor([[1.0, 0.0], [0.7, 0.3], [1.0, 0.0]])
)
SETTINGS = NeighbourSettings(k=2)
FOUND = {"sigma": 0.5, "settings": SETTINGS.model_dump(mode="json")}


@pytest.fixture
def store(tmp_path):
    write_samples(tmp_path / "store", SAMPLES, ABOUT)
    write_neighbours(tmp_path / "store", NEIGHBOURS, FOUND)
    return tmp_path / "store"


def batch_of(samples):
    return replace(make_batch([9, 9]), sidecar={"sample_S": torch.tensor(samples, dtype=torch.int64)})


def test_rows_come_by_the_samples_identity(store):
    joined = NeighbourStore(store, model="digest", settings=SETTINGS).join(batch_of([2**62, 5, 17, 5]))
    expected = [SAMPLES.routing_NR[[i, j]] for i, j in ((0, 0), (2, 0), (0, 2), (2, 0))]
    assert torch.equal(joined.sidecar["neighbour_routing_SKR"], torch.stack(expected))
    assert torch.equal(joined.sidecar["neighbour_weights_SK"], NEIGHBOURS.weight_NK[[2, 0, 1, 0]])
    assert joined.sidecar["sample_S"].tolist() == [2**62, 5, 17, 5], "the rest of the sidecar stays"
    empty = NeighbourStore(store, model="digest", settings=SETTINGS).join(batch_of([]))
    assert empty.sidecar["neighbour_routing_SKR"].shape == (0, 2, 4)


def test_a_store_of_means_joins_one_row_for_each_sample(store):
    means = AverageNeighbours(
        mean_NR=torch.rand(3, 4), spread_NR=torch.rand(3, 4), weight_N=torch.tensor([1.0, 0.0, 1.0])
    )
    write_neighbours(store, means, FOUND)
    sidecar = NeighbourStore(store, model=None, settings=None).join(batch_of([17, 2**62])).sidecar
    assert torch.equal(sidecar["neighbour_routing_SKR"], means.mean_NR[[1, 2], None])
    assert sidecar["neighbour_weights_SK"].tolist() == [[0.0], [1.0]]
    assert torch.equal(sidecar["neighbour_spread_SR"], means.spread_NR[[1, 2]])


def test_neighbours_of_other_settings_are_refused(store):
    with pytest.raises(UserError, match=r"were found with k=2, not with .* \(k=5\): run launch/align\.py neighbours"):
        NeighbourStore(store, model="digest", settings=NeighbourSettings(k=5))
    write_neighbours(store, NEIGHBOURS, {"k": 2})
    with pytest.raises(UserError, match="were found with an earlier version, not with"):
        NeighbourStore(store, model="digest", settings=SETTINGS)


def test_a_sample_that_is_not_there_is_said(store):
    opened = NeighbourStore(store, model="digest", settings=SETTINGS)
    for strangers in ([5, 18, 6], [2**62 + 1], [0]):
        missing = [s for s in strangers if s != 5]
        message = rf"lacks {len(missing)} of a batch's {len(strangers)} samples, such as {missing[0]}"
        with pytest.raises(UserError, match=message):
            opened.join(batch_of(strangers))
    with pytest.raises(UserError, match=r"data\.neighbours=.*store needs instructions, but data\.shards holds none"):
        opened.join(make_batch([9, 9]))


def test_a_store_of_another_model_is_refused(store):
    with pytest.raises(UserError, match=r"collected with another model \(runs/x/checkpoints/step_00000008\)"):
        NeighbourStore(store, model="other", settings=SETTINGS)


def test_an_unfinished_or_damaged_store_is_refused(store):
    (store / "neighbours.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"neighbours\.safetensors is missing, damaged"):
        NeighbourStore(store, model="digest", settings=SETTINGS)
    write_samples(store, SAMPLES, ABOUT)  # collecting again removes the neighbours of the old samples
    with pytest.raises(UserError, match="has no neighbours yet"):
        NeighbourStore(store, model="digest", settings=SETTINGS)
    (store / "store.json").unlink()
    with pytest.raises(UserError, match=r"store\.json is missing"):
        NeighbourStore(store, model="digest", settings=SETTINGS)


def test_an_empty_success_set_is_refused(tmp_path):
    nothing = replace(SAMPLES, right_N=torch.zeros(3, dtype=torch.bool))
    with pytest.raises(UserError, match="the success set is empty: the model answers none of 3 samples correctly"):
        write_samples(tmp_path, nothing, ABOUT)


def test_what_is_said_of_a_store_and_its_identity(store):
    samples, about = read_samples(store)
    assert torch.equal(samples.routing_NR, SAMPLES.routing_NR)
    assert about["samples"] == 3 and about["right"] == 2 and about["neighbours"] == FOUND
    before = NeighbourStore(store, model="digest", settings=SETTINGS).identity
    assert before == NeighbourStore(store, model="digest", settings=SETTINGS).identity
    write_neighbours(store, replace(NEIGHBOURS, weight_NK=NEIGHBOURS.weight_NK.flip(1)), FOUND)
    assert NeighbourStore(store, model="digest", settings=SETTINGS).identity != before


def loader(neighbours=None, state=None):
    documents = random_instructions(seed=3, count=40)
    return make_loader(
        MemoryStore(documents),
        SmallVocabulary(),
        data_config(),
        seed=0,
        dp_rank=0,
        dp=1,
        batch_groups=2,
        neighbours=neighbours,
        state=state,
    )


def store_of_instructions(folder, seed):
    """Write and open a store of the loader's 40 instructions, in which all routing values of sample i are i."""
    samples = Samples(
        sample_N=10**18 + torch.arange(40),
        right_N=torch.arange(40) % 2 == 0,
        routing_NR=torch.arange(40.0)[:, None].expand(40, 4),
    )
    neighbour_NK = torch.randint(40, (40, 2), generator=torch.Generator().manual_seed(seed))
    write_samples(folder, samples, ABOUT)
    write_neighbours(folder, Neighbours(neighbour_NK=neighbour_NK, weight_NK=torch.full((40, 2), 0.5)), FOUND)
    return NeighbourStore(folder, model="digest", settings=SETTINGS), neighbour_NK


def test_the_loader_joins_every_batch_and_goes_on_with_the_same_store_only(tmp_path):
    store, neighbour_NK = store_of_instructions(tmp_path / "one", seed=1)
    batches = loader(store)
    for _ in range(4):
        batch, state, _ = next(batches)
        samples = (batch.sidecar["sample_S"] - 10**18).tolist()
        assert samples, "a batch without instructions compares nothing"
        assert batch.sidecar["neighbour_routing_SKR"][:, :, 0].tolist() == neighbour_NK[samples].tolist()
    again = next(loader(store, state=state)).batch
    assert torch.equal(again.sidecar["sample_S"], next(batches)[0].sidecar["sample_S"])
    other, _ = store_of_instructions(tmp_path / "two", seed=2)
    with pytest.raises(UserError, match=r"saved with data\.neighbours=\w{64}, this run has data\.neighbours=\w{64}"):
        loader(other, state=state)
    without = next(loader()).state
    with pytest.raises(UserError, match=r"saved with data\.neighbours=None"):
        loader(store, state=without)
    next(loader(state=state))  # evaluation does not need the store
