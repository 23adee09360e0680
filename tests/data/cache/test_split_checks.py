"""What a split holds and lacks: data.expect, captions that are cut, pictures that nobody tokenises."""

import io
import shutil
import tarfile

import pytest

from moe_dist.config.recipe import DataConfig
from moe_dist.core.errors import UserError
from moe_dist.core.strict import validate
from moe_dist.data.cache.split_checks import check_expected
from moe_dist.data.cache.token_cache import TokenStore, build_cache, load_vocabulary, open_store
from moe_dist.data.cache.token_shard import TEXTLESS
from moe_dist.data.shards.sample_report import SampleReport
from moe_dist.data.shards.tars import Sample, write_shards
from moe_dist.data.tokenizers.image_tokenizer import load_image_tokenizer
from moe_dist.data.tokenizers.text_tokenizer import load_text_tokenizer
from moe_dist.data.tokenizers.vocabulary import Vocabulary
from moe_dist.training.setup import _show, _warn

WORDS = "a red cross on a white ground"
INSTRUCTION = {"prompt": "What is it?\nAnswer:", "answer": " joker", "domain": "emoji"}


@pytest.fixture
def store_of(tokenizers, tmp_path):
    """Return a function that opens the tokens of the given samples, or of the tars already in `shards`."""

    def make(samples=(), *, split="train", **changes) -> TokenStore:
        folder = tmp_path / "shards"
        if samples:
            write_shards([*samples, Sample("held-out", "validation", None, "held out")], folder)
        raw = {"shards": str(folder), "text_tokenizer": str(tokenizers / "text.model"), "sequence_length": 128}
        raw["image_tokenizer"] = str(tokenizers / "vq")
        data = validate(DataConfig, raw | changes, "test", "data")
        vocabulary = load_vocabulary(data)
        build_cache(data, split, vocabulary)
        return open_store(data, split, vocabulary)

    return make


@pytest.fixture
def vocabulary(tokenizers):
    return Vocabulary(load_text_tokenizer(str(tokenizers / "text.model")), load_image_tokenizer(str(tokenizers / "vq")))


@pytest.fixture
def png(emoji_samples):
    return emoji_samples[0].png


@pytest.fixture
def pairs(png):
    return [Sample(f"pair{i}", "train", png, WORDS) for i in range(4)]


def test_what_is_used_is_told(store_of, vocabulary, pairs, png, capsys):
    picture, text = Sample("picture", "train", png), Sample("text", "train", None, WORDS, {"id": 3})
    asked = Sample("asked", "train", png, None, INSTRUCTION)
    store = store_of([*pairs, picture, text, asked])
    assert store.contents == "5 pairs of picture and text, 1 pictures alone, 1 texts alone"
    assert store.report.used == len(store) == store.report.total == 7
    _show("train", store, vocabulary)
    counts, first = capsys.readouterr().err.splitlines()
    assert counts == f"train: {store.contents}; unused by design: json field id (1)"
    assert first.startswith("train: the first sample: ")


@pytest.mark.parametrize(
    ("sample", "shown"),
    [
        ({"png": True, "caption": WORDS}, f"a picture of 16 codes, caption '{WORDS}'"),
        ({"png": True}, "a picture of 16 codes"),
        ({"caption": "two\nlines"}, r"text 'two\nlines'"),
        ({"caption": "red cross " * 20}, f"text '{('red cross ' * 20)[:100]}'..."),
        ({"meta": INSTRUCTION}, r"prompt 'What is it?\nAnswer:', answer 'joker'"),
        ({"png": True, "meta": {"caption": [WORDS, "other"]}}, f"a picture of 16 codes, caption '{WORDS}'"),
    ],
)
def test_the_first_sample_is_shown_as_the_model_reads_it(store_of, vocabulary, png, sample, shown, capsys):
    anything = {"expect": "text", "max_bad_fraction": 1.0}
    store = store_of([Sample("a", "train", **sample | {"png": png if "png" in sample else None})], **anything)
    _show("train", store, vocabulary)
    assert capsys.readouterr().err.splitlines()[-1] == f"train: the first sample: {shown}"


def test_pictures_and_texts_in_tars_of_their_own_are_told(store_of, vocabulary, png, pairs, tmp_path, capsys):
    apart = [Sample("a", "train", png), Sample("b", "train", None, WORDS)]
    sentence = "warning: train: no sample has a picture and a text; the members of a sample belong in one tar"
    _show("train", store_of(apart), vocabulary)
    assert sentence in capsys.readouterr().err.splitlines()
    shutil.rmtree(tmp_path / "shards")
    _show("train", store_of([*apart, *pairs]), vocabulary)
    assert sentence not in capsys.readouterr().err


EXPECTED = [
    ("pairs", {"pair"}),
    ("images", {"pair", "picture"}),
    ("text", {"pair", "text"}),
    ("any", {"pair", "picture", "text"}),
]


@pytest.mark.parametrize(("expect", "allowed"), EXPECTED)
@pytest.mark.parametrize("kind", ["pair", "picture", "text"])
def test_the_run_stops_if_the_corpus_is_not_what_is_expected(store_of, pairs, png, expect, allowed, kind):
    other = {"pair": (png, WORDS), "picture": (png, None), "text": (None, WORDS)}[kind]
    samples = [*pairs, Sample("other", "train", *other)]
    if kind in allowed:
        assert len(store_of(samples, expect=expect)) == 5
        return
    with pytest.raises(UserError, match=rf"data\.expect={expect}, but the training samples are 4 pairs of .*mend the"):
        store_of(samples, expect=expect)
    assert len(store_of(expect=expect, max_bad_fraction=0.2)) == 5
    assert len(store_of(expect=expect, split="validation")) == 1, "the held-out samples may be others"


def test_an_image_tokenizer_without_pictures_is_refused(store_of):
    texts = [Sample(f"t{i}", "train", None, WORDS) for i in range(3)]
    with pytest.raises(UserError, match=r"no training sample has a picture \(0 pairs .* 3 texts alone\); leave it out"):
        store_of(texts)
    assert len(store_of(expect="text")) == 3
    assert len(store_of(image_tokenizer=None)) == 3


def test_pictures_without_an_image_tokenizer_are_counted(store_of, pairs, png):
    store = store_of([*pairs, Sample("picture", "train", png)], image_tokenizer=None)
    assert store.contents == "0 pairs of picture and text, 0 pictures alone, 4 texts alone"
    assert store.report.unused == {TEXTLESS: 1}


def test_a_caption_without_room_is_lost(store_of, pairs, png):
    short = Sample("short", "train", png)
    asked = Sample("asked", "train", png, None, INSTRUCTION)
    store = store_of([*pairs, short, asked])
    assert not store.report.lost
    codes = store.image_tokens // 6
    length = max(len(store.document(i).text) for i in range(6) if store.document(i).prompt is None)
    room = {"sequence_length": codes + 4 + length}
    assert not store_of(**room, max_bad_fraction=1.0).report.lost, "room for the whole caption"
    room = {"sequence_length": codes + 4 + 2}
    with pytest.raises(
        UserError, match=rf"4 of 6 lost a part: 4 caption cut: {4 * (length - 2)} of {4 * length} tokens \("
    ):
        store_of(**room)
    report = store_of(**room, max_bad_fraction=1.0).report
    assert dict(report.lost) == {f"caption cut: {4 * (length - 2)} of {4 * length} tokens": 4}
    assert report.used + report.lost.total() + report.bad.total() == report.total == 6
    assert len(store_of(**room, max_bad_fraction=1.0, expect="images")) > 0, "captions do not matter"


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def own_tar(tmp_path, png):
    """Write 20 training samples whose picture cannot be read, and 20 good ones."""
    for split in ("train", "validation"):
        (tmp_path / "shards" / split).mkdir(parents=True)
        members = {}
        for i in range(20):
            members |= {f"a{i}.psd": b"8BPS", f"a{i}.txt": WORDS.encode()}
            members |= {f"b{i}.png": png, f"b{i}.v2.jpg": png, f"b{i}.txt": WORDS.encode()}
            members |= {f"c{i}.png": png, f"c{i}.txt": WORDS.encode()}
        write_tar(tmp_path / "shards" / split / "a.tar", members)


def test_lost_parts_stop_the_run_and_are_kept_with_the_tokens(store_of, own_tar):
    sentence = (
        r"0 of 60 samples skipped; 40 of 60 lost a part: 20 image member \.psd is not supported \(a0, a1, a2\), 20 "
    )
    for _ in range(2):  # tokens made, then found
        with pytest.raises(UserError, match=sentence):
            store_of()
    store = store_of(max_bad_fraction=0.7)
    assert store.contents == "40 pairs of picture and text, 0 pictures alone, 20 texts alone"
    assert store.report.used == 20
    cut = store_of(max_bad_fraction=1.0, sequence_length=store.image_tokens // 40 + 4 + 2).report
    assert cut.lost.total() == 60 and cut.used == 0, "a sample that lost two parts is counted once"
    texts = store_of(image_tokenizer=None)
    assert len(texts) == 60 and texts.report.lost.total() == 40, "a text model misses no pictures"


@pytest.mark.parametrize("percent", [1, 7, 29, 57, 58])
def test_the_largest_allowed_fraction_is_allowed(percent):
    """Also where the fraction times 100 is not a whole number in floating point."""
    report = SampleReport(total=100)
    for number in range(percent):
        report.add_bad("undecodable image", str(number))
    report.check(percent / 100)
    raw = {"shards": "a", "text_tokenizer": "b", "max_bad_fraction": percent / 100, "expect": "pairs"}
    data = validate(DataConfig, raw, "test", "data")
    check_expected(data, 100, 100 - percent, 0, "")
    report.add_bad("undecodable image", "one more")
    with pytest.raises(UserError, match="allows fewer"):
        report.check(percent / 100)
    with pytest.raises(UserError, match=r"data\.expect=pairs"):
        check_expected(data, 100, 99 - percent, 0, "")


def test_shards_of_a_split_that_are_read_elsewhere_too_are_told(tokenizers, tmp_path, capsys):
    """Shards given twice, copies, held-out shards that are trained on, and tars that no split reads."""
    for number in range(3):
        own = [Sample(f"{number}-{i}", "train", None, f"{WORDS} {number} {i}") for i in range(40)]
        write_shards(own, tmp_path / str(number))
    one, two, three = (tmp_path / str(number) / "train" / "shard-000000.tar" for number in range(3))
    copy, extra = tmp_path / "copy.tar", tmp_path / "2" / "val"
    shutil.copy(one, copy)
    extra.mkdir()
    for name in ("a.tar", "b.TAR", "c.tar.xz", "d.tar"):
        shutil.copy(two, extra / name)

    def told(shards, validation=None):
        raw = {"shards": shards, "validation_shards": validation, "text_tokenizer": f"{tokenizers}/text.model"}
        data = validate(DataConfig, raw, "test", "data")
        vocabulary, stores = load_vocabulary(data), {}
        for split in ("train", "validation"):
            build_cache(data, split, vocabulary)
            stores[split] = open_store(data, split, vocabulary)
        _warn(data, stores)
        return capsys.readouterr().err.splitlines()

    twice = "warning: 1 shards have the content of another one, so their samples count twice"
    held_out = "warning: 1 held-out shards are trained on, too, so the held-out loss does not show how"
    assert told([f"{one}", f"{three}"], f"{two}") == told(f"{three.parent}") == []
    assert told([f"{one}", f"{two}", f"{copy}"], f"{three}") == [f"{twice} (copy.tar)"]
    assert told(f"{one}", f"{copy}") == [f"{held_out} a model generalises (copy.tar)"]
    unread = ", ".join(f"{extra / name}" for name in ("a.tar", "b.TAR", "c.tar.xz"))
    assert told(f"{tmp_path / '2'}") == [f"warning: 4 files in the shard folders are read by no split ({unread}, ...)"]
