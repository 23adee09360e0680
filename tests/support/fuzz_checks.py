"""Checks of damaged input in this process: one sentence or a result, no other exception, no hang, and nothing lost.

Each check returns a text that depends only on the input, so that a second call must return the same.
"""

from __future__ import annotations

import hashlib
import itertools
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer

from moe_dist.config.prerequisites import missing
from moe_dist.config.recipe import DataConfig, load_config, load_stored_config, save_config
from moe_dist.core.errors import UserError
from moe_dist.core.strict import validate
from moe_dist.data.cache.token_cache import build_cache, open_store
from moe_dist.data.cache.token_shard import TEXTLESS
from moe_dist.data.shards.sample_groups import NO_KEY
from moe_dist.data.shards.sample_report import SampleReport
from moe_dist.data.shards.samples import RawSample
from moe_dist.data.shards.shard_index import verify_shard
from moe_dist.data.shards.strict_tar import tar_entries
from moe_dist.data.shards.tars import SPLITS, Shard, iterate
from moe_dist.data.tasks.choice_items import read_choices
from moe_dist.data.tokenizers.hugging_face_text import HuggingFaceTokenizer
from moe_dist.data.tokenizers.image_tokenizer import load_image_tokenizer
from moe_dist.data.tokenizers.text_tokenizer import load_text_tokenizer
from moe_dist.data.tokenizers.vocabulary import Vocabulary
from moe_dist.parallel.layout import Layout
from moe_dist.training.setup import check_recipe
from tests.support.fuzz_tars import headers, key_of

SECONDS = 20  # a case takes milliseconds
MOST_PIXELS = 64  # of the side of a picture to encode
LONGEST = 2000  # characters of a sentence
SENTENCES = ("", "a small red rose", "caf\u00e9 \U0001f600\n two  blanks ", "\x00\u2581<s></s>")


class Fault(AssertionError):
    """Raised if an input makes the product hang, lose something in silence or give an unreadable error."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise Fault in this thread if the `with` block takes longer. A timer that was running goes on afterwards."""

    def late(*_) -> None:
        raise Fault(f"more than {seconds} seconds")

    handler = signal.signal(signal.SIGALRM, late)
    before, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, before)
        signal.signal(signal.SIGALRM, handler)


def outcome(check: Callable[[], str]) -> str:
    """Return what a check returns, or the sentence of its UserError. Every other exception passes."""
    try:
        with deadline(SECONDS):
            return check()
    except UserError as error:
        sentence = str(error)
        if not sentence or "\n" in sentence or len(sentence) > LONGEST or "Traceback" in sentence:
            raise Fault(f"not one sentence: {sentence!r}") from None
        return f"error: {sentence}"


def same(one: object, other: object, what: str) -> None:
    if one != other:
        raise Fault(f"{what}: {one!r} and {other!r}")


# ------------------------------------------------------------------------------------------------------------- tars


def check_tar(path: Path, vocabulary: Vocabulary) -> str:
    """Read a tar in every way and account for its members, its samples and the documents made of them."""
    indexed = outcome(lambda: f"{verify_shard(path).count} samples")
    read = outcome(lambda: _read(path))
    if indexed.startswith("error: "):
        same(read.startswith("error: "), True, f"the index says {indexed}, the reader {read}")
        return indexed
    if read.startswith("error: "):  # an instruction, which the index does not read
        return read
    return read + " | " + outcome(lambda: _tokenise(path, vocabulary))


def _read(path: Path) -> str:
    report = SampleReport()
    samples = list(iterate(str(path), report))
    with path.open("rb") as stream:
        names = [name for name, _ in tar_entries(stream)]
    found = headers(path.read_bytes())
    if found is not None:
        same(len(names), found, "members read and headers in the tar")
    keys = [key_of(name) for name in names]
    runs = [key for key, _ in itertools.groupby(key for key in keys if key is not None)]
    same(len(set(runs)), len(runs), "a key that comes back was accepted")
    same(report.total, len(runs), "samples read and keys in the tar")
    same(report.unused[NO_KEY], keys.count(None), "members without a key")
    _account(samples, report)
    split = [(Shard(str(path), name), SampleReport()) for name in SPLITS]
    keys_read = sorted(sample.key for shard, part in split for sample in iterate(shard, part))
    same(keys_read, sorted(sample.key for sample in samples), "the samples of all splits and all samples")
    same(sum(part.total for _, part in split), report.total, "the totals of all splits and the total")
    return f"{_digest(samples)} {report.to_json()}"


def _account(samples: list[RawSample], report: SampleReport) -> None:
    whole = [sample for sample in samples if sample.loss is None]
    same(len(whole), report.used, "samples without a loss and used samples")
    same(report.used + report.bad.total() + report.lost.total(), report.total, "used, bad and lost samples")
    for sample in samples:
        same(sample.image is None and not sample.texts, False, f"{sample.key} is empty")
        "".join(sample.texts).encode()
    report.summary().encode()


def _digest(samples: list[RawSample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr((sample.key, sample.texts, sample.hash, sample.loss, sample.unused)).encode())
        digest.update(sample.image.tobytes() if sample.image else b"-")
    return digest.hexdigest()[:16]


def _tokenise(path: Path, vocabulary: Vocabulary) -> str:
    """Make documents of a tar's samples and of its multiple-choice items."""
    settings = {
        "shards": str(path),
        "validation_shards": str(path),
        "text_tokenizer": "unused",
        "max_bad_fraction": 1.0,
    }
    data = validate(DataConfig, settings, "fuzz")
    build_cache(data, "train", vocabulary)
    store = open_store(data, "train", vocabulary)
    report = store.report
    skipped = report.total - report.bad.total() - len(store) - report.unused[TEXTLESS]
    same(0 <= skipped <= report.lost.total() <= report.total - report.bad.total(), True, f"{skipped} of {report}")
    for number in range(len(store)):
        document = store.document(number)
        same(len(document.text) > 0 or document.image is not None, True, f"document {number} is empty")
    choices = outcome(lambda: str(sorted(read_choices(data, "train", vocabulary.text)[0].items())))
    return f"{store.contents} {report.summary()} {store.lengths.sum()} {choices}"


# ------------------------------------------------------------------------------------------------------- tokenizers


def check_text_tokenizer(path: Path) -> str:
    """Load a text tokenizer and encode a few texts as ids of its vocabulary."""
    vocabulary = Vocabulary(load_text_tokenizer(path))
    ids = [vocabulary.text.encode(text) for text in SENTENCES]
    same(all(0 <= i < vocabulary.text.size for i in itertools.chain(*ids)), True, f"{ids} of {vocabulary.text.size}")
    texts = [vocabulary.text.decode(part) for part in ids]
    markers = (vocabulary.pad, vocabulary.bos, vocabulary.eos)
    same(all(0 <= i < vocabulary.size for i in markers), True, f"{markers} of {vocabulary.size}")
    if isinstance(vocabulary.text, HuggingFaceTokenizer):
        named = Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab().values()
        same(max(named, default=-1) < vocabulary.text.size, True, "an id above the vocabulary")
    return repr((vocabulary.describe(), markers, ids, texts))


def check_image_tokenizer(path: Path) -> str:
    """Load an image tokenizer and encode a picture as codes of its codebook."""
    tokenizer = load_image_tokenizer(path)
    size = tokenizer.image_size
    if size > MOST_PIXELS:  # valid, but slow
        return f"{tokenizer.sha256} {size}"
    pixels = torch.linspace(-1, 1, 3 * size * size).view(1, 3, size, size)
    codes = tokenizer.encode(pixels)
    same(codes.shape, (1, tokenizer.num_codes), "codes of a picture and those announced")
    same(bool((codes >= 0).all() and (codes < tokenizer.codebook_size).all()), True, f"codes {codes}")
    return f"{tokenizer.sha256} {size} {tokenizer.codebook_size} {codes.tolist()}"


# ---------------------------------------------------------------------------------------------------------- recipes


def check_recipe_file(path: Path, overrides: list[str]) -> str:
    """Load a recipe, check it as a run does before it reads data, and write and read it again."""
    config = load_config(path, overrides)
    stored = path.with_name("stored.yaml")
    save_config(config, stored)
    same(load_stored_config(stored), config, "a stored recipe and the recipe")
    needs = [str(need) for need in missing(config)]
    checked = outcome(
        lambda: str(check_recipe(config, Layout(expert=config.parallel.expert, world=config.parallel.expert)))
    )
    return f"{stored.read_text()} {needs} {checked}"
