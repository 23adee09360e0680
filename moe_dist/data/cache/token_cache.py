"""The token cache: the captions and images of every shard as vocabulary ids, so training never runs a tokenizer.

A shard's tokens are stored next to it in tokens/<vocabulary>/<shard>/. If the shard is remote or its folder is
read-only, they are stored in the user's cache folder. <vocabulary> is a digest of both tokenizers. <shard> ends in a
digest of the shard's checksum, the split, the chat template, and the format of the token files. For a remote shard, the
URL replaces the checksum. If one of these changes, the shard is tokenised again. A folder may contain tokens/ but no
tars. Its tokens must then have been made with the recipe's tokenizers and in the current format.

Call order on every rank: load_vocabulary, build_cache, a barrier, open_store.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moe_dist.config.recipe import DataConfig
from moe_dist.core.errors import UserError
from moe_dist.data.cache.split_checks import check_expected, content_digest, count_cut_captions, replaced_shards
from moe_dist.data.cache.token_shard import (
    TOKEN_SHARD_FORMAT,
    TOKEN_SHARD_MANIFEST,
    StoredDocument,
    TokenShard,
    TokenShardWriter,
)
from moe_dist.data.shards.sample_report import CAPTION_LOSS, IMAGE_LOSS, SampleReport
from moe_dist.data.shards.samples import RawSample
from moe_dist.data.shards.shard_index import local_path, user_cache, verify_shard
from moe_dist.data.shards.tars import SHARD_SUFFIXES, Shard, Split, iterate, resolve_shards
from moe_dist.data.tokenizers.image_tokenizer import load_image_tokenizer
from moe_dist.data.tokenizers.text_tokenizer import load_text_tokenizer
from moe_dist.data.tokenizers.vocabulary import Vocabulary

TOKENS = "tokens"  # name of the folder next to the tars
DIGITS = 16  # length of a digest in a folder's name


def load_vocabulary(data: DataConfig) -> Vocabulary:
    """Load a recipe's tokenizers as one joint vocabulary. Raises UserError if a tokenizer is missing or damaged."""
    image = load_image_tokenizer(data.image_tokenizer) if data.image_tokenizer is not None else None
    return Vocabulary(load_text_tokenizer(data.text_tokenizer), image)


# ----------------------------------------------------------------------------------------------------------- reading


class TokenStore:
    """The documents of a split, ordered by entry of data.shards, then by shard, then by sample.

    An instruction is never cut. If an instruction is longer than a sequence, it is left out and counted in the report.
    If a caption does not fit into a sequence together with its image, it is cut and counted in the report.
    """

    def __init__(self, parts: Sequence[Sequence[TokenShard]], sequence_length: int) -> None:
        self.shards = shards = [shard for part in parts for shard in part]
        self._ends = np.cumsum([len(shard) for shard in shards])
        self.digest = content_digest(shards)
        self.text_tokens = sum(shard.manifest["text_tokens"] for shard in shards)
        self.image_tokens = sum(shard.manifest["image_tokens"] for shard in shards)
        has_image = np.concatenate([shard.image_rows >= 0 for shard in shards])
        text_lengths = np.concatenate([shard.text_lengths for shard in shards])
        image_codes = self.image_tokens // max(1, int(has_image.sum()))
        lengths = text_lengths + image_codes * has_image
        self.report = SampleReport()  # samples that became documents, skipped samples and lost parts
        for shard in shards:
            self.report.merge(shard.report)
        if sequence_length >= image_codes + 4:  # otherwise packing says that no image fits
            count_cut_captions(self.report, shards, sequence_length - image_codes - 4)
        self._kept = self._without_long_instructions(lengths + 2 + 2 * has_image, sequence_length)
        self.pairs = int((has_image & (text_lengths > 0))[self._kept].sum())
        self.texts = int((~has_image[self._kept]).sum())
        self.has_image, self.lengths = has_image[self._kept], lengths[self._kept]  # text and image tokens, no markers
        self.domains = tuple(sorted({domain for shard in shards for domain in shard.domains}))
        self.part_ends = np.searchsorted(self._kept, np.cumsum([sum(map(len, part)) for part in parts]))

    def _without_long_instructions(self, lengths: np.ndarray, sequence_length: int) -> np.ndarray:
        """Return the indices of all documents except overlong instructions. lengths: in tokens, including markers."""
        kept = np.ones(len(lengths), dtype=bool)
        for shard, end in zip(self.shards, self._ends, strict=True):
            prompted = shard.prompts[:, 0] + end - len(shard)
            kept[long := prompted[lengths[prompted] - shard.omitted_markers > sequence_length]] = False
            for number in sorted({*(long - end + len(shard)).tolist()} - {*shard.manifest["short_documents"]}):
                key = f"{shard.manifest['shard']} number {number}"
                self.report.add_bad(f"instruction longer than data.sequence_length={sequence_length}", key)
        return np.flatnonzero(kept)

    @property
    def contents(self) -> str:
        """Describe the documents in a line such as `90 pairs of picture and text, 8 pictures alone, 2 texts alone`."""
        pictures = len(self) - self.pairs - self.texts
        return f"{self.pairs} pairs of picture and text, {pictures} pictures alone, {self.texts} texts alone"

    def replaced(self) -> list[str]:
        return replaced_shards(self.shards)

    def __len__(self) -> int:
        return len(self._kept)

    def document(self, index: int, choice: int = 0) -> StoredDocument:
        """Return document number `index`. If it has n captions, its text is caption number `choice` mod n."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        index = int(self._kept[index])
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self.shards[number]
        return shard.document(index - int(self._ends[number]) + len(shard), choice)


def open_store(data: DataConfig, split: Split, vocabulary: Vocabulary) -> TokenStore:
    """Open the tokens of a split. Before this, build_cache must have run on every rank.

    Raises UserError if tokens are missing, damaged or made with other tokenizers, if there are no samples, if more
    samples are bad or have a lost part than data.max_bad_fraction allows, or if training samples do not match
    data.expect.
    """
    parts: list[list[TokenShard]] = []
    for part in _parts(data, split):
        if isinstance(part, Path):
            folders = _shipped_token_shards(part, split, vocabulary)
        else:
            folders = [_Source.of(shard, vocabulary, content=False).made() for shard in part]
        parts.append([TokenShard(folder) for folder in folders])
    store = TokenStore(parts, data.sequence_length)
    no_pictures = IMAGE_LOSS if vocabulary.image is None or data.expect == "text" else ()
    no_captions = CAPTION_LOSS if data.expect == "images" else ()
    store.report.check_samples(split)
    store.report.check(data.max_bad_fraction, (*no_pictures, *no_captions))
    if split == "train":
        check_expected(data, len(store), store.pairs, store.texts, store.contents)
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
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Tokenise this rank's share of a split's shards. Skip shards that are already in the cache.

    Rank 0 shows its progress. Every local tar of the share is checked against its index, even if its tokens are cached.
    If `stop` returns True, keep the finished shards and return. Raises UserError if a shard is damaged or its tokens
    cannot be written. Only the rank that finds the problem raises it. The caller must raise it on the other ranks too.
    """
    tars: list[Shard] = []
    for part in _parts(data, split):
        if isinstance(part, Path):
            _shipped_token_shards(part, split, vocabulary)  # those of other tokenizers are an error here
        else:
            tars += part
    sources = [_Source.of(shard, vocabulary, content=True) for shard in tars[rank::world] if not stop()]
    missing = [source for source in sources if source.find() is None]
    if missing:
        _tokenise(missing, split, vocabulary, device, stop, shown=rank == 0)


def _tokenise(
    missing: Sequence[_Source],
    split: Split,
    vocabulary: Vocabulary,
    device: torch.device | str,
    stop: Callable[[], bool],
    *,
    shown: bool,
) -> None:
    """Tokenise the shards in `missing`. Return early if `stop` returns True. shown: whether to show a progress bar."""
    if vocabulary.image is not None:
        vocabulary.image.to(device)
    columns = (TextColumn("tokenising {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not shown) as progress:
        known = all(source.samples for source in missing)
        task = progress.add_task(f"{split} samples", total=sum(source.samples for source in missing) if known else None)
        for number, source in enumerate(missing, 1):
            report, writer = SampleReport(), TokenShardWriter(vocabulary, device)
            writer.add(_counted(iterate(source.shard, report), progress, task, stop))
            if stop():
                return
            writer.write(source.new_folder(), source.origin, report)
            if known:  # also counts the samples of other splits in the same tars
                progress.update(task, completed=sum(source.samples for source in missing[:number]))


def _counted(samples: Iterable[RawSample], progress: Progress, task, stop: Callable[[], bool]) -> Iterator[RawSample]:
    for sample in samples:
        if stop():
            return
        yield sample
        progress.advance(task)


# ----------------------------------------------------------------------------------------------- places of tokens


@dataclass(frozen=True, slots=True)
class _Source:
    """A shard, and the folders that may hold its tokens."""

    shard: Shard
    samples: int  # 0: unknown (remote), or none
    origin: dict[str, str | None]  # identifies the raw content
    homes: tuple[Path, ...]  # folders of token shards, the preferred one first
    name: str

    @classmethod
    def of(cls, shard: Shard, vocabulary: Vocabulary, *, content: bool) -> _Source:
        """Check a shard and list its token folders. content: whether to check the checksum, not only the size."""
        path = local_path(shard.url)
        index = verify_shard(path, content=content) if path else None
        identity = index.sha256 if index else shard.url
        made_from = f"{identity} {shard.split} {shard.validation} {vocabulary.text.chat.digest} {TOKEN_SHARD_FORMAT}"
        digest = hashlib.sha256(made_from.encode()).hexdigest()[:DIGITS]
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
        return next(
            (home / self.name for home in self.homes if (home / self.name / TOKEN_SHARD_MANIFEST).is_file()), None
        )

    def made(self) -> Path:
        """Return the folder that holds the shard's tokens. Raises UserError if there is none."""
        folder = self.find()
        if folder is None:
            raise UserError(f"the token cache of shard {self.shard.url} is missing")
        return folder

    def new_folder(self) -> Path:
        for home in self.homes:
            try:
                home.mkdir(parents=True, exist_ok=True)
            except OSError:
                continue
            if os.access(home, os.W_OK, effective_ids=True):
                return home / self.name
        tried = " and ".join(str(home) for home in self.homes)
        raise UserError(f"the tokens of shard {self.shard.url} cannot be written: tried {tried}")


def _parts(data: DataConfig, split: Split) -> list[list[Shard] | Path]:
    """Return each entry of the split's shards as a list of tars, or as a folder if it has tokens but no tars."""
    held_out = data.validation_shards if split == "validation" else None
    own = data.shards if held_out is None else held_out
    parts: list[list[Shard] | Path] = []
    for part in [own] if isinstance(own, str) else own:
        folder = _shipped_folder(Path(part), split)
        if folder is not None:
            parts.append(folder)
        elif held_out is not None:
            parts.append(resolve_shards((), split, part))
        else:
            parts.append(resolve_shards(part, split, data.validation_shards, data.validation_fraction))
    return parts


def _shipped_folder(part: Path, split: Split) -> Path | None:
    root = part.parent if part.name == "train" else part
    for folder in (root / split, part):
        if (folder / TOKENS).is_dir() and not any(file.name.endswith(SHARD_SUFFIXES) for file in folder.iterdir()):
            return folder
    return None


def _shipped_token_shards(folder: Path, split: Split, vocabulary: Vocabulary) -> list[Path]:
    mine = folder / TOKENS / vocabulary.fingerprint()[:DIGITS]
    found = sorted(manifest.parent for manifest in (folder / TOKENS).glob(f"[!.]*/[!.]*/{TOKEN_SHARD_MANIFEST}"))
    shards = [TokenShard(path) for path in found]
    usable = [s for s in shards if s.folder.parent == mine and s.manifest["format"] == TOKEN_SHARD_FORMAT]
    whole = [] if folder.name == "train" != split else [s for s in usable if s.manifest["split"] is None]
    matching = [shard for shard in usable if shard.manifest["split"] == split] or whole
    if not matching:
        made = {f"{s.manifest['made_with']} in format {s.manifest['format']}" for s in shards}
        raise UserError(
            f"the tokens of {split} in {folder} were made with {' or '.join(sorted(made)) or 'nothing'}, but the "
            f"recipe names {vocabulary.describe()} in format {TOKEN_SHARD_FORMAT}, and there are no tars to "
            "tokenise again"
        )
    return [shard.folder for shard in matching]
