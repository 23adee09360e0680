"""Shards: writing a corpus as WebDataset tars, finding the tars and JSONL files that a recipe names, and checking and
reading them.

A prepared corpus consists of the files OUT/{train,validation,test}/shard-%06d.tar. The index of a local shard
records its number of samples, size and sha256. A shard is checked against its index before it is read, because the
webdataset library silently stops reading where a tar is damaged.

If a shard has no index yet, the whole shard is read to build one. UserError is raised if a tar
has a damaged header or no end marker.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from webdataset import ShardWriter
from webdataset.gopen import gopen, set_options
from webdataset.shardlists import expand_urls

from moe_dist.core.errors import UserError
from moe_dist.data.shards.jsonl import JSONL_SUFFIXES, is_jsonl, jsonl_samples
from moe_dist.data.shards.sample_groups import SampleFiles, sample_groups
from moe_dist.data.shards.sample_report import SampleReport, readable
from moe_dist.data.shards.samples import (
    MAX_MEGAPIXELS,
    BadSample,
    LostSample,
    RawSample,
    decode_sample,
)
from moe_dist.data.shards.shard_index import local_path, verify_shard
from moe_dist.data.shards.split_names import split_name
from moe_dist.data.shards.strict_tar import DAMAGE, explain, tar_entries

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
HELD_OUT = 0.05  # fraction of the keys in the validation split; the same for the test split
SAMPLES_PER_SHARD = 256
EMPTY = "shards without samples"
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
SHARD_SUFFIXES = (*TAR_SUFFIXES, *JSONL_SUFFIXES)
_SHARD = re.compile(r"\.((tar|jsonl|ndjson)(\.(gz|bz2|xz|zst|lz4))?|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
SIGPIPE_STATUS = [0, 23, 141, -13]  # exit statuses of curl, a shell and a command whose reader stops early


def split_of(key: str, validation: float = HELD_OUT) -> Split:
    """Return the split to which a key belongs. The split depends only on the hash of the key.

    key: a sample's key, or a name that related samples share so that they are in the same split.
    validation: the fraction of the keys in the validation split.
    """
    position = int.from_bytes(_digest(key)[:8]) / 2**64
    return "test" if position < HELD_OUT else "validation" if position < HELD_OUT + validation else "train"


# ---------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample made by a corpus builder.

    It has an image in PNG format, a caption, or both. The text of an instruction is in `meta`. The key contains no dots
    or spaces.
    """

    key: str
    split: Split
    png: bytes | None = None
    caption: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)  # stored as the .json member


def write_shards(samples: Iterable[Sample], out: Path, samples_per_shard: int = SAMPLES_PER_SHARD) -> dict[str, int]:
    """Write samples as OUT/<split>/shard-%06d.tar, ordered by the hash of their keys.

    Returns the number of samples in each split, keyed by split. Empty splits are omitted. The same samples always give
    identical files.
    """
    ordered = sorted(samples, key=lambda sample: _digest(sample.key))
    if len({sample.key for sample in ordered}) < len(ordered):
        raise ValueError("two samples have the same key")
    counts: dict[str, int] = {}
    for split in SPLITS:
        mine = [sample for sample in ordered if sample.split == split]
        if mine:
            counts[split] = len(mine)
            _write_split(mine, out / split, samples_per_shard)
    return counts


def _write_split(samples: Sequence[Sample], folder: Path, samples_per_shard: int) -> None:
    folder.mkdir(parents=True)
    pattern = str(folder / "shard-%06d.tar")
    with ShardWriter(pattern, maxcount=samples_per_shard, verbose=0, mtime=0, post=verify_shard) as writer:
        for sample in samples:
            members = {"png": sample.png, "txt": sample.caption, "json": sample.meta}
            writer.write({"__key__": sample.key} | {k: v for k, v in members.items() if v is not None})


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()


# ------------------------------------------------------------------------------------------------------ finding


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar or JSONL file, and the split whose samples are read from it. If `split` is None, all samples are read."""

    url: str
    split: Split | None = None
    validation: float = HELD_OUT  # fraction of the samples in the validation split


def resolve_shards(
    spec: str | Sequence[str],
    split: Split = "train",
    validation: str | Sequence[str] | None = None,
    fraction: float = HELD_OUT,
) -> list[Shard]:
    """Return the shards of one split in a fixed order.

    Raises UserError if a file or folder is missing, or if a folder contains no tars.

    spec (data.shards): prepared folders, flat folders, brace-expanded paths, or URLs that webdataset accepts. A
    prepared folder has a subfolder for each split. A flat folder contains the tars themselves.
    validation (data.validation_shards): the shards of the validation split. If they are given, training uses all
    samples of the flat folders, paths and URLs in `spec`. If they are not given, split_of divides these samples: about
    5 % are for test, about `fraction` (data.validation_fraction) for validation, and the rest for training.
    """
    if split == "validation" and validation is not None:
        return [shard for part in _parts(validation) for shard in _resolve(part, split, flat_split=None)]
    flat_split = None if split == "train" and validation is not None else split
    found = [shard for part in _parts(spec) for shard in _resolve(part, split, flat_split)]
    return [replace(shard, validation=fraction) for shard in found]


def _parts(spec: str | Sequence[str]) -> Sequence[str]:
    return [spec] if isinstance(spec, str) else spec


def _resolve(part: str, split: Split, flat_split: Split | None) -> list[Shard]:
    if Path(part).is_dir():
        return _resolve_folder(Path(part), split, flat_split)
    urls = [str(url) for url in expand_urls(part)]
    for url in urls:
        path = local_path(url)
        if path and not path.is_file():
            raise UserError(f"there is no shard file or folder {path} (from {part})")
        if url.endswith(".json"):
            raise UserError(f"{url} is no shard: write each record on a line of its own, `jq -c .[] FILE > FILE.jsonl`")
    return [Shard(url, flat_split) for url in urls]


def _resolve_folder(folder: Path, split: Split, flat_split: Split | None) -> list[Shard]:
    root = folder.parent if folder.name == "train" else folder
    # Without a validation folder, split the tars of train/ by key, or held-out samples would be trained on too.
    prepared = bool(_tars(root / "train") and _tars(root / "validation"))
    tars = _tars(root / split) if prepared else _tars(folder) or _tars(folder / "train")
    if not tars:
        raise UserError(
            f"the shard folder {root / split if prepared else folder} holds no .tar files, and no .jsonl files"
        )
    return [Shard(str(tar), None if prepared else flat_split) for tar in tars]


def _tars(folder: Path) -> list[Path]:
    """Return the tars of a folder; if there are none, its JSONL files."""
    files = sorted(file for file in folder.iterdir() if not file.name.startswith(".")) if folder.is_dir() else []
    tars = [file for file in files if file.name.endswith(TAR_SUFFIXES)]
    return tars or [file for file in files if file.name.endswith(JSONL_SUFFIXES)]


def unread_shards(*specs: str | Sequence[str] | None) -> list[str]:
    """Return the paths of tars and JSONL files that no split reads.

    Only the folders of `specs` and their direct subfolders are searched. Examples of unread files are the tars of
    a folder val/ (it must be called validation/), tars next to the folder train/, tars with other endings than
    TAR_SUFFIXES, and JSONL files next to tars.
    """
    parts = [part for spec in specs if spec is not None for part in _parts(spec)]
    unread: set[str] = set()
    for part in filter(os.path.isdir, parts):
        for folder in (part, *(entry.path for entry in _entries(part) if entry.is_dir())):
            files = (entry for entry in _entries(folder) if _SHARD.search(entry.name))
            unread |= {str(Path(file.path)) for file in files if not file.name.startswith(".")}
    for part in parts if unread else ():
        for split in SPLITS:
            with suppress(UserError, OSError):  # a folder need not have a test split
                unread -= {str(local_path(shard.url)) for shard in resolve_shards(part, split)}
    return sorted(unread)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """Return the files and folders in a folder, or [] if the folder cannot be read (for example, lost+found)."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


# ---------------------------------------------------------------------------------------------------------- reading


def verify_shards(shards: Iterable[Shard]) -> int:
    """Check every local shard against its index, and build the indexes that are missing.

    Returns the number of samples in the local shards. Remote shards have no index: iterate() detects damage while
    reading them. Raises UserError naming the shard if a shard is damaged or does not match its index.
    """
    return sum(verify_shard(path).count for shard in shards if (path := local_path(shard.url)))


def iterate(
    shard: Shard | str, report: SampleReport | None = None, *, max_megapixels: float = MAX_MEGAPIXELS
) -> Iterator[RawSample]:
    """Yield the samples of a shard in order, skipping those that cannot be used.

    Skipped samples, lost parts and unused parts are counted in `report`. Raises UserError naming the shard if the shard
    cannot be read, if the tar is damaged, if the members of a sample are not consecutive, or if an instruction is
    malformed.
    """
    shard = Shard(shard) if isinstance(shard, str) else shard
    report = SampleReport() if report is None else report
    before = report.total + report.other_splits
    for files in _groups(shard.url, report.unused):
        if shard.split is not None and _split(files, shard) != shard.split:
            report.other_splits += 1
            continue
        files = replace(files, key=readable(files.key))
        report.total += 1
        try:
            sample = decode_sample(files, shard.url, max_megapixels=max_megapixels)
        except BadSample as reason:
            report.add_bad(str(reason), files.key)
            continue
        except LostSample as error:
            report.add_lost(error.loss)
            continue
        report.add_unused(sample.unused)
        if sample.loss is not None:
            report.add_lost(sample.loss)
        yield sample
    if report.total + report.other_splits == before:
        report.add_unused([EMPTY])


def _split(files: SampleFiles, shard: Shard) -> Split:
    return split_of(split_name(files, line=is_jsonl(shard.url)), shard.validation)


def _groups(url: str, unused: Counter[str]) -> Iterator[SampleFiles]:
    try:
        with gopen(url) as stream:
            set_options(stream, ignore_status=SIGPIPE_STATUS)
            if is_jsonl(url):
                yield from jsonl_samples(stream, url)
            else:
                yield from sample_groups(tar_entries(stream), url, unused)
    except DAMAGE as error:
        raise UserError(f"cannot read shard {url}: {explain(error)}") from None
