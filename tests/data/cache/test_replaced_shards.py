"""A run that resumes on other shards than those of its checkpoint: refused by name, also if the number of samples is
the same.
"""

import os
import shutil

import pytest

from moe_dist.config.recipe import DataConfig
from moe_dist.core.errors import UserError
from moe_dist.core.strict import validate
from moe_dist.data.cache.token_cache import build_cache, load_vocabulary, open_store
from moe_dist.data.shards.tars import Sample, write_shards
from moe_dist.data.stream.loader import make_loader

SECOND = "shard-000001.tar"


@pytest.fixture
def folder(tmp_path):
    """Write 12 texts as three shards."""
    return write_texts(tmp_path / "shards", "a bear")


def write_texts(folder, text):
    write_shards([Sample(f"{i}", "train", None, f"{text} {i}") for i in range(12)], folder, samples_per_shard=4)
    return folder / "train"


@pytest.fixture
def loader_of(tokenizers):
    """Return a function that opens a loader of the texts in a folder."""

    def make(folder, state=None):
        raw = {"shards": str(folder), "validation_shards": "unused", "text_tokenizer": str(tokenizers / "text.model")}
        data = validate(DataConfig, raw | {"lanes": 1, "sequence_length": 32}, "test", "data")
        vocabulary = load_vocabulary(data)
        build_cache(data, "train", vocabulary)
        store = open_store(data, "train", vocabulary)
        return make_loader(store, vocabulary, data, seed=0, dp_rank=0, dp=1, batch_groups=1, state=state)

    return make


@pytest.fixture
def state(folder, loader_of):
    """The state of a loader after its first batch."""
    return next(loader_of(folder)).state


def test_the_same_shards_are_accepted_whatever_their_time_stamp_and_folder(folder, loader_of, state, tmp_path):
    os.utime(folder / SECOND, (0, 0))
    loader_of(folder, state)
    loader_of(shutil.copytree(folder, tmp_path / "copy"), state)
    for file in folder.glob("*.tar"):
        file.unlink()
    loader_of(folder, state)  # tokens alone
    assert len(state["of"]["shards"]) == 32, "one digest, not one per shard"


@pytest.mark.parametrize("index", ["kept", "deleted", "replaced"])
def test_a_shard_replaced_by_one_of_equal_count_is_refused_by_name(folder, loader_of, state, tmp_path, index):
    other = write_texts(tmp_path / "other", "a boat")
    shutil.copy(other / SECOND, folder / SECOND)
    if index == "deleted":
        (folder / f"{SECOND}.index.json").unlink()
    elif index == "replaced":
        shutil.copy(other / f"{SECOND}.index.json", folder)
    sentence = "corrupt or was replaced" if index == "kept" else "not those of the saved loader state.*was replaced by"
    with pytest.raises(UserError, match=rf"(?=.*{sentence}).*{SECOND}"):
        loader_of(folder, state)
    if index != "kept":
        loader_of(folder)  # a new run may read it


def test_shards_in_another_order_are_refused(folder, loader_of, state):
    for path in folder.glob(f"{SECOND}*"):
        path.rename(folder / path.name.replace("01.tar", "09.tar"))
    with pytest.raises(UserError, match="a shard was replaced by another"):
        loader_of(folder, state)
