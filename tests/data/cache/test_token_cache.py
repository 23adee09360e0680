"""The token cache compared with the tokenizers themselves, on real shards: complete or absent, never mixed up."""

import itertools
import json
import shutil
import stat
import tarfile

import numpy as np
import pytest
import torch

from moe_dist.config.recipe import DataConfig
from moe_dist.core.errors import UserError
from moe_dist.core.strict import validate
from moe_dist.data.cache.token_cache import TokenStore, build_cache, load_vocabulary, open_store
from moe_dist.data.shards.tars import Sample, iterate, resolve_shards, split_of, write_shards
from moe_dist.data.tokenizers.pixels import crop_and_resize, scale_pixels


@pytest.fixture
def shards(emoji_shards, tmp_path):
    return shutil.copytree(emoji_shards, tmp_path / "shards", ignore=shutil.ignore_patterns("tokens"))


@pytest.fixture
def recipe(tokenizers, shards):
    def make(text="text.model", image="vq", **changes) -> DataConfig:
        raw = {"shards": str(shards), "text_tokenizer": str(tokenizers / text)}
        raw["image_tokenizer"] = str(tokenizers / image) if image else None
        return validate(DataConfig, raw | changes, "test", "data")

    return make


def store_of(data: DataConfig, split="train", world=1) -> TokenStore:
    vocabulary = load_vocabulary(data)
    for rank in range(world):
        build_cache(data, split, vocabulary, rank=rank, world=world)
    return open_store(data, split, vocabulary)


def manifests(folder):
    return sorted(folder.glob("tokens/*/*/manifest.json"))


def test_every_document_is_what_the_tokenizers_say(recipe):
    data = recipe()
    v, store = load_vocabulary(data), store_of(data)
    samples = [sample for shard in resolve_shards(data.shards) for sample in iterate(shard)]
    assert len(store) == len(samples) == 132
    for index, sample in enumerate(samples):
        document = store.document(index)
        assert v.text.decode(document.text) == sample.caption
        codes = v.image.encode(scale_pixels(crop_and_resize(sample.image, 32)[None]))
        assert torch.equal(torch.from_numpy(document.image), v.image_code(codes[0]))
        assert store.lengths[index] == len(document.text) + len(document.image)
    assert store.has_image.all() and store.image_tokens == 132 * 16
    assert store.text_tokens == sum(store.lengths) - store.image_tokens
    assert store.report.total == 132 and not store.report.bad
    with pytest.raises(IndexError):
        store.document(132)


def test_the_held_out_split_has_its_own_store(recipe):
    train, held_out = store_of(recipe()), store_of(recipe(), "validation")
    assert len(held_out) == 32
    texts = {store.document(i).text.tobytes() for store in (train,) for i in range(len(train))}
    assert not texts & {held_out.document(i).text.tobytes() for i in range(32)}


def test_work_is_shared_and_a_partial_cache_is_not_taken(recipe, shards):
    data = recipe()
    v = load_vocabulary(data)
    build_cache(data, "train", v, rank=0, world=2)
    done = manifests(shards / "train")
    assert 0 < len(done) < len(resolve_shards(data.shards))
    with pytest.raises(UserError, match=r"the token cache of shard .*shard-000001\.tar is missing"):
        open_store(data, "train", v)
    times = [path.stat().st_mtime_ns for path in done]
    build_cache(data, "train", v, rank=1, world=2)
    build_cache(data, "train", v)  # everything is cached: nothing is written again
    assert [path.stat().st_mtime_ns for path in done] == times
    assert len(open_store(data, "train", v)) == 132
    assert not list(shards.glob("**/.shard*"))  # no temporary files left


def test_an_interrupted_writer_leaves_nothing_that_counts(recipe, shards, monkeypatch):
    data = recipe()
    v = load_vocabulary(data)
    monkeypatch.setattr("moe_dist.data.cache.token_shard.write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_cache(data, "train", v)
    monkeypatch.undo()
    assert not manifests(shards / "train")
    assert len(store_of(data)) == 132


def test_told_to_stop_it_keeps_whole_shards_and_goes_on_later(recipe, shards):
    data = recipe()
    v, tars = load_vocabulary(data), len(resolve_shards(data.shards))
    asked = itertools.count()
    # stop() is called before each tar is checked, before each sample and after each shard: it acts in the second one.
    build_cache(data, "train", v, stop=lambda: next(asked) >= tars + 16 + 1 + 5)
    assert len(manifests(shards / "train")) == 1
    build_cache(data, "train", v, stop=lambda: True)
    assert len(manifests(shards / "train")) == 1
    assert len(store_of(data)) == 132


def test_files_are_small_plain_arrays(recipe, shards):
    store_of(recipe())
    folder = manifests(shards / "train")[0].parent
    arrays = {file.stem: np.load(file) for file in folder.glob("*.npy")}
    assert arrays["text"].dtype == arrays["image"].dtype == np.uint16
    assert arrays["image"].shape == (16, 16) and arrays["text_ends"][-1] == len(arrays["text"])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["documents"] == 16 and manifest["samples"]["total"] == 16
    assert "400 pieces" in manifest["made_with"] and "32 x 32, 32 codes" in manifest["made_with"]


@pytest.mark.parametrize("change", [{"text": "other.model"}, {"image": "other_vq"}, {"image": None}])
def test_other_tokenizers_make_another_cache(recipe, change):
    first, second = store_of(recipe()), store_of(recipe(**change))
    one, other = first.document(0), second.document(0)
    if "text" in change:
        assert one.text.tolist() != other.text.tolist()
    else:
        assert one.text.tolist() == other.text.tolist()
        assert other.image is None or one.image.tolist() != other.image.tolist()
    assert store_of(recipe()).document(0).image.tolist() == one.image.tolist()


def test_a_changed_tar_makes_new_tokens(recipe, shards, emoji_samples):
    v = load_vocabulary(recipe())
    before = v.text.decode(store_of(recipe()).document(3).text)
    shutil.rmtree(shards)
    changed = [Sample(s.key, s.split, s.png, f"{s.caption} again", s.meta) for s in emoji_samples]
    write_shards(changed, shards, samples_per_shard=16)
    assert v.text.decode(store_of(recipe()).document(3).text) == f"{before} again"


def test_texts_and_pictures_without_captions(recipe, tmp_path, emoji_samples):
    png = emoji_samples[0].png
    samples = [
        Sample("a", "train", None, "only text"),
        Sample("b", "train", png),
        Sample("c", "train", png, "both"),
        Sample("d", "train", None, ""),
    ]
    write_shards(samples[:3], tmp_path / "mixed")
    store = store_of(recipe(shards=str(tmp_path / "mixed")))
    kinds = {(len(d.text) > 0, d.image is not None) for d in map(store.document, range(3))}
    assert kinds == {(True, False), (False, True), (True, True)} and store.has_image.sum() == 2
    texts = store_of(recipe(shards=str(tmp_path / "mixed"), image=None))
    assert len(texts) == 2 and not texts.has_image.any() and texts.image_tokens == 0


def test_bad_images_are_skipped_counted_and_limited(recipe, tmp_path, emoji_samples):
    good = [s for s in emoji_samples if s.split == "train"][:9]
    bad = Sample("broken", "train", good[0].png[:200], "a broken picture")
    held_out = [s for s in emoji_samples if s.split == "validation"][:1]
    write_shards([*good, bad, *held_out], tmp_path / "bad", samples_per_shard=5)
    with pytest.raises(
        UserError, match=r"1 of 10 samples skipped: 1 undecodable image \(broken\).*max_bad_fraction=0.01"
    ):
        store_of(recipe(shards=str(tmp_path / "bad")))
    store = store_of(recipe(shards=str(tmp_path / "bad"), max_bad_fraction=0.1))
    assert len(store) == 9 and store.report.bad == {"undecodable image": 1}


@pytest.mark.parametrize("cached", [False, True])
def test_a_damaged_tar_is_named(recipe, shards, cached):
    data = recipe()
    if cached:
        store_of(data)
    tar = shards / "train" / "shard-000002.tar"
    content = bytearray(tar.read_bytes())
    content[2000] ^= 255
    tar.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-000002\.tar is corrupt"):
        store_of(data)
    tar.write_bytes(content[:5000])
    with pytest.raises(UserError, match=r"shard-000002\.tar is truncated"):
        store_of(data)


def test_a_damaged_cache_is_named(recipe, shards):
    store_of(recipe())
    image = manifests(shards / "train")[1].with_name("image.npy")
    image.write_bytes(image.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"token cache .* is damaged \(image\.npy\)"):
        store_of(recipe())


def test_a_read_only_folder_gets_its_tokens_in_the_users_cache(recipe, shards, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("moe_dist.data.cache.token_cache.os.access", lambda path, mode, **_: "cache" in str(path))
    (shards / "train").chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert len(store_of(recipe())) == 132
    assert len(list((tmp_path / "cache").glob("moe_dist/tokens/*/*/manifest.json"))) == 9
    assert not manifests(shards / "train")


def test_shipped_tokens_need_no_tars_but_the_same_tokenizers(recipe, shards):
    before = store_of(recipe())
    store_of(recipe(), "validation")
    for tar in shards.glob("*/*.tar"):
        tar.unlink()
    store = store_of(recipe())
    assert [store.document(i).text.tolist() for i in range(132)] == [
        before.document(i).text.tolist() for i in range(132)
    ]
    assert len(store_of(recipe(shards=str(shards / "train")), "validation")) == 32
    with pytest.raises(UserError, match=r"made with text tokenizer .*\(400 pieces\).*recipe names .*\(380 pieces\)"):
        build_cache(recipe(text="other.model"), "train", load_vocabulary(recipe(text="other.model")))
    with pytest.raises(UserError, match="no image tokenizer"):
        open_store(recipe(image=None), "train", load_vocabulary(recipe(image=None)))


def test_shipped_training_tokens_are_never_the_held_out_ones(recipe, shards):
    store_of(recipe())
    shutil.rmtree(shards / "validation")
    for tar in shards.glob("*/*.tar"):
        tar.unlink()
    with pytest.raises(UserError):
        store_of(recipe(shards=str(shards / "train")), "validation")


@pytest.fixture
def ten(tmp_path, emoji_samples):
    """Write ten samples, all of which fall into the training split, as a flat folder of one tar."""
    samples = [Sample(s.key, "train", s.png, s.caption) for s in emoji_samples if split_of(s.key) == "train"][:10]
    write_shards(samples, tmp_path / "ten")
    return tmp_path / "ten" / "train"


def test_a_flat_folder_of_ten_samples_says_what_to_set(recipe, ten):
    assert len(store_of(recipe(shards=str(ten)))) == 10
    sentence = r"none of the 10 samples in the shards belongs to the validation split.*; set data.validation_shards to"
    with pytest.raises(UserError, match=sentence):
        store_of(recipe(shards=str(ten)), "validation")
    data = recipe(shards=str(ten), validation_shards=str(ten))
    assert len(store_of(data)) == len(store_of(data, "validation")) == 10


def test_an_empty_shard_is_counted(recipe, ten):
    with tarfile.open(ten / "shard-000001.tar", "w"):
        pass
    store = store_of(recipe(shards=str(ten)))
    assert len(store) == store.report.used == 10 and dict(store.report.unused) == {"shards without samples": 1}
    (ten / "shard-000000.tar").unlink()
    with pytest.raises(UserError, match="the shards of the train split hold no samples"):
        store_of(recipe(shards=str(ten)))


def test_a_users_flat_folder_is_split_by_key(recipe, tmp_path, emoji_samples):
    everything = [Sample(s.key, "train", s.png, s.caption) for s in emoji_samples]
    write_shards(everything, tmp_path / "all")
    flat = shutil.copytree(tmp_path / "all" / "train", tmp_path / "flat")
    data = recipe(shards=str(flat))
    sizes = [len(store_of(data, split)) for split in ("train", "validation", "test")]
    assert sum(sizes) == 196 and min(sizes) > 0 and sizes[0] > 150
    for tar in flat.glob("*.tar"):
        tar.unlink()
    assert [len(store_of(data, split)) for split in ("train", "validation", "test")] == sizes
