"""The token cache: the captions and images of every shard as vocabulary ids. Training never runs a tokenizer.

A shard's tokens lie beside it in tokens/<vocabulary>/<shard>/, or in the user's cache folder where the shard is remote
or its folder cannot be written. The name of <vocabulary> is the digest of both tokenizers, that of <shard> ends in a
digest of the tar's checksum (of a remote shard's URL) and of the split read out of it: another tokenizer or another tar
never meets old tokens, it makes new ones. A folder may be shipped with tokens/ and no tars; its tokenizers must match.

Call order on every rank: load_vocabulary, build_cache, a barrier, open_store.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe_dist.config import DataConfig
from moe_dist.data.image import load_image_tokenizer
from moe_dist.data.samples import RawSample, SampleReport
from moe_dist.data.shard_index import local_path, user_cache, verify_shard
from moe_dist.data.shards import TAR_SUFFIXES, Shard, Split, iterate, resolve_shards
from moe_dist.data.text import TextTokenizer
from moe_dist.data.token_shard import MANIFEST, Document, TokenShard, TokenShardWriter
from moe_dist.data.vocabulary import Vocabulary
from moe_dist.errors import UserError

TOKENS = "tokens"  # name of the folder beside the tars
DIGITS = 16  # of a digest in a folder's name


def load_vocabulary(data: DataConfig) -> Vocabulary:
    """The vocabulary of the two tokenizers that a recipe names. Raises UserError."""
    image = load_image_tokenizer(data.image_tokenizer) if data.image_tokenizer is not None else None
    return Vocabulary(TextTokenizer(data.text_tokenizer), image)


# ----------------------------------------------------------------------------------------------------------- reading


class TokenStore:
    """The documents of a split, in the order of the shards and of the samples in them."""

    def __init__(self, shards: Sequence[TokenShard]) -> None:
        self._shards = shards
        self._ends = np.cumsum([len(shard) for shard in shards])
        self.text_tokens = sum(shard.manifest["text_tokens"] for shard in shards)
        self.image_tokens = sum(shard.manifest["image_tokens"] for shard in shards)
        self.has_image = np.concatenate([shard.image_rows >= 0 for shard in shards])  # bool per document
        text_lengths = np.concatenate([np.diff(shard.text_ends, prepend=0) for shard in shards])
        image_codes = self.image_tokens // max(1, int(self.has_image.sum()))
        self.lengths = text_lengths + image_codes * self.has_image  # text and image tokens per document, no markers
        self.report = SampleReport()  # the samples behind the documents, and those that could not be used
        for shard in shards:
            self.report.merge(shard.report)

    def __len__(self) -> int:
        return len(self.has_image)

    def document(self, index: int) -> Document:
        """The document of this number, 0 <= index < len."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[number]
        return shard.document(index - int(self._ends[number]) + len(shard))


def open_store(data: DataConfig, split: Split, vocabulary: Vocabulary) -> TokenStore:
    """The tokens of a split, after build_cache ran on every rank.

    Raises UserError if a shard's tokens are missing or damaged, if shipped tokens were made with other tokenizers, or
    if more than data.max_bad_fraction of the split's samples could not be used.
    """
    tars, shipped = _sources(data, split)
    folders = list(_shipped_token_shards(shipped, split, vocabulary))
    for source in (_Source.of(shard, vocabulary, content=False) for shard in tars):
        folder = source.find()
        if folder is None:
            raise UserError(f"the token cache of shard {source.shard.url} is missing")
        folders.append(folder)
    store = TokenStore([TokenShard(folder) for folder in folders])
    store.report.check(data.max_bad_fraction)
    return store


# ------------------------------------------------------------------------------------------------------------ making


def build_cache(
    data: DataConfig,
    split: Split,
    vocabulary: Vocabulary,
    *,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
) -> None:
    """Tokenise this rank's share of a split's shards, where that is not done yet; rank 0 shows its progress.

    Every local tar of the share is checked against its index, tokenised already or not. Raises UserError on the rank
    that meets the problem; the caller tells the others.
    """
    tars, shipped = _sources(data, split)
    list(_shipped_token_shards(shipped, split, vocabulary))  # shipped tokens of other tokenizers are an error here
    sources = [_Source.of(shard, vocabulary, content=True) for shard in tars[rank::world]]
    missing = [source for source in sources if source.find() is None]
    if not missing:
        return
    if vocabulary.image is not None:
        vocabulary.image.to(device)
    columns = (TextColumn("tokenising {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=rank != 0) as progress:
        known = all(source.samples for source in missing)
        task = progress.add_task(f"{split} samples", total=sum(source.samples for source in missing) if known else None)
        for number, source in enumerate(missing, 1):
            report = SampleReport()
            writer = TokenShardWriter(vocabulary, device)
            writer.add(_counted(iterate(source.shard, report), progress, task))
            writer.write(source.new_folder(), source.origin, report)
            if known:  # samples of other splits in the same tar are done as well
                progress.update(task, completed=sum(source.samples for source in missing[:number]))


def _counted(samples: Iterable[RawSample], progress: Progress, task) -> Iterator[RawSample]:
    for sample in samples:
        yield sample
        progress.advance(task)


# ---------------------------------------------------------------------------------------------- where the tokens lie


@dataclass(frozen=True, slots=True)
class _Source:
    """A shard, and where its tokens may lie."""

    shard: Shard
    samples: int  # 0: not known (remote)
    origin: dict[str, str | None]  # identifies the raw content
    homes: tuple[Path, ...]  # folders of token shards, the preferred one first
    name: str

    @classmethod
    def of(cls, shard: Shard, vocabulary: Vocabulary, *, content: bool) -> _Source:
        """content: check the whole tar against its checksum, not only its size."""
        path = local_path(shard.url)
        index = verify_shard(path, content=content) if path else None
        identity = index.sha256 if index else shard.url
        digest = hashlib.sha256(f"{identity} {shard.split}".encode()).hexdigest()[:DIGITS]
        file = re.sub(r"[^\w.-]+", "_", shard.url.rpartition("/")[2])[-64:]
        parents = (path.parent, user_cache()) if path else (user_cache(),)
        return cls(
            shard=shard,
            samples=index.count if index else 0,
            origin={"shard": file, "identity": identity, "split": shard.split},
            homes=tuple(parent / TOKENS / vocabulary.fingerprint()[:DIGITS] for parent in parents),
            name=f"{file}-{digest}",
        )

    def find(self) -> Path | None:
        return next((home / self.name for home in self.homes if (home / self.name / MANIFEST).is_file()), None)

    def new_folder(self) -> Path:
        for home in self.homes:
            try:
                home.mkdir(parents=True, exist_ok=True)
            except OSError:
                continue
            if os.access(home, os.W_OK):
                return home / self.name
        tried = " and ".join(str(home) for home in self.homes)
        raise UserError(f"the tokens of shard {self.shard.url} cannot be written: tried {tried}")


def _sources(data: DataConfig, split: Split) -> tuple[list[Shard], list[Path]]:
    """The split's tars, and the folders that hold tokens in place of tars."""
    own = data.validation_shards if split == "validation" and data.validation_shards is not None else data.shards
    parts = [own] if isinstance(own, str) else list(own)
    shipped = {part: folder for part in parts if (folder := _shipped_folder(Path(part), split))}
    raw = [part for part in parts if part not in shipped]
    if own is data.validation_shards:
        return (resolve_shards((), split, raw) if raw else []), list(shipped.values())
    return (resolve_shards(raw, split, data.validation_shards) if raw else []), list(shipped.values())


def _shipped_folder(part: Path, split: Split) -> Path | None:
    root = part.parent if part.name == "train" else part
    for folder in (root / split, part):
        if (folder / TOKENS).is_dir() and not any(file.name.endswith(TAR_SUFFIXES) for file in folder.iterdir()):
            return folder
    return None


def _shipped_token_shards(folders: Iterable[Path], split: Split, vocabulary: Vocabulary) -> Iterator[Path]:
    for folder in folders:
        mine = folder / TOKENS / vocabulary.fingerprint()[:DIGITS]
        found = sorted(manifest.parent for manifest in (folder / TOKENS).glob(f"[!.]*/[!.]*/{MANIFEST}"))
        shards = [TokenShard(path) for path in found]
        usable = [shard for shard in shards if shard.folder.parent == mine]
        whole = [] if folder.name == "train" != split else [s for s in usable if s.manifest["split"] is None]
        matching = [shard for shard in usable if shard.manifest["split"] == split] or whole
        if not matching:
            made_with = " or ".join(sorted({s.manifest["made_with"] for s in shards})) or "nothing"
            raise UserError(
                f"the tokens of {split} in {folder} were made with {made_with}, "
                f"but the recipe names {vocabulary.describe()}, and there are no tars to tokenise anew"
            )
        yield from (shard.folder for shard in matching)
