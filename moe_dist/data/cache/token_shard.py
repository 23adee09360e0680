"""The tokens of one shard on disk: memory-mapped .npy files and a manifest.

  text.npy        vocabulary ids of all captions and texts, concatenated (uint16, or int32 for a larger vocabulary)
  text_ends.npy   int64 [documents]: end of each document's text in text.npy
  captions.npy    int64 [additional captions, 2], in the order of text.npy: document, start of the caption in its
                  text. All captions after the first one of a document are additional captions
  image.npy       vocabulary ids of the image codes [images, codes of an image], in the dtype of text.npy
  image_rows.npy  int64 [documents]: the document's row of image.npy, -1 without an image
  prompts.npy     int64 [instructions, 5], ordered by document: document, length of the prompt in its text, index into
                  the manifest's `domains`, hash that identifies the sample, markers (1: BOS, 2: EOS, 3: both)
  later.npy       int64 [further prompts, 3], ordered by document: document, start and end of the prompt in its text
  manifest.json   the shard and the tokenizers from which the tokens were made; the numbers of documents and tokens; a
                  report on skipped samples; the documents that lost a part, such as the image; file sizes

The folder is written under a temporary name and renamed when it is complete, so a token shard that exists is complete.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_dist.core.errors import UserError
from moe_dist.core.files import new_folder, read_json, write_json
from moe_dist.data.shards.sample_report import SampleReport
from moe_dist.data.shards.samples import RawSample
from moe_dist.data.tasks.conversations import tokenised
from moe_dist.data.tasks.instructions import InstructionPrompt, NoBoundary
from moe_dist.data.tokenizers.image_tokenizer import ImageTokenizer
from moe_dist.data.tokenizers.pixels import crop_and_resize, scale_pixels
from moe_dist.data.tokenizers.vocabulary import Vocabulary

TOKEN_SHARD_FORMAT = 5  # part of a token shard's name; increase it when the files change
TOKEN_SHARD_MANIFEST = "manifest.json"
TEXTLESS = "pictures without text, since the recipe has no data.image_tokenizer"
IMAGES_AT_ONCE = 128  # images per call of the image tokenizer


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """One sample as vocabulary ids (int64), without markers such as BOS and EOS."""

    text: np.ndarray  # one caption, may be empty; for an instruction, the prompts and answers
    image: np.ndarray | None  # codes row by row
    prompt: InstructionPrompt | None  # None unless it is an instruction


class TokenShard:
    """A token shard opened for reading. Raises UserError if a file is missing or has the wrong size."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_json(folder / TOKEN_SHARD_MANIFEST)
        for name, size in self.manifest["files"].items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                raise UserError(f"the token cache {folder} is damaged ({name}); delete it to have it made again")

    def __len__(self) -> int:
        return self.manifest["documents"]

    @property
    def report(self) -> SampleReport:
        return SampleReport.from_json(self.manifest["samples"])

    @cached_property
    def text_ends(self) -> np.ndarray:
        return np.load(self.folder / "text_ends.npy")

    @cached_property
    def captions(self) -> np.ndarray:
        return np.load(self.folder / "captions.npy")

    @cached_property
    def caption_lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """For every caption: its document, and its number of tokens. Both arrays are ordered by document.

        Texts count as captions.
        """
        begins = self.text_ends - np.diff(self.text_ends, prepend=0)
        further, start = self.captions.T
        documents = np.concatenate([np.arange(len(self)), further])
        starts = np.concatenate([begins, begins[further] + start])
        order = np.lexsort((starts, documents))
        return documents[order], np.diff(starts[order], append=self.manifest["text_tokens"])

    @property
    def text_lengths(self) -> np.ndarray:
        """The number of tokens of each document's text. If it has several captions, only the first one counts."""
        documents, lengths = self.caption_lengths
        return lengths[np.searchsorted(documents, np.arange(len(self)))]

    @cached_property
    def image_rows(self) -> np.ndarray:
        return np.load(self.folder / "image_rows.npy")

    @cached_property
    def prompts(self) -> np.ndarray:
        return np.load(self.folder / "prompts.npy")

    @property
    def omitted_markers(self) -> np.ndarray:
        """For each instruction, the number of markers (BOS and EOS) that packing does not add: 0, 1 or 2."""
        return 2 - (self.prompts[:, 4] & 1) - (self.prompts[:, 4] >> 1)

    @cached_property
    def _later(self) -> np.ndarray:
        return np.load(self.folder / "later.npy")

    @property
    def domains(self) -> list[str]:
        """Return the names of the domains to which the shard's instructions belong, sorted."""
        return self.manifest["domains"]

    @cached_property
    def _text(self) -> np.ndarray:
        return np.load(self.folder / "text.npy", mmap_mode="r" if self.manifest["text_tokens"] else None)

    @cached_property
    def _image(self) -> np.ndarray:
        return np.load(self.folder / "image.npy", mmap_mode="r" if self.manifest["image_tokens"] else None)

    def document(self, index: int, choice: int = 0) -> StoredDocument:
        """Return the document with the number `index`, 0 <= index < len.

        choice: if the document has n captions, the result contains caption number `choice` mod n, counted from 0.
        """
        begin = self.text_ends[index - 1] if index else 0
        first, last = np.searchsorted(self.captions[:, 0], [index, index + 1])
        bounds = [begin, *(begin + self.captions[first:last, 1]), self.text_ends[index]]
        number = choice % (len(bounds) - 1)
        row = self.image_rows[index]
        text = self._text[bounds[number] : bounds[number + 1]].astype(np.int64)
        return StoredDocument(text, self._image[row].astype(np.int64) if row >= 0 else None, self._prompt(index))

    def _prompt(self, index: int) -> InstructionPrompt | None:
        at = np.searchsorted(self.prompts[:, 0], index)
        if at == len(self.prompts) or self.prompts[at, 0] != index:
            return None
        _, length, domain, sample, markers = self.prompts[at].tolist()
        first, last = np.searchsorted(self._later[:, 0], [index, index + 1])
        later = tuple((start, end) for _, start, end in self._later[first:last].tolist())
        return InstructionPrompt(length, self.domains[domain], sample, later, bool(markers & 1), bool(markers & 2))


class TokenShardWriter:
    """A writer that first collects the tokens of a shard's samples in memory, then writes the token shard.

    If the vocabulary has no image tokenizer, pictures are dropped and samples without text are skipped. In this case,
    `add` raises UserError for an instruction about a picture.
    """

    def __init__(self, vocabulary: Vocabulary, device: torch.device | str = "cpu") -> None:
        self.vocabulary, self.device = vocabulary, device
        self._texts: list[np.ndarray] = []
        self._captions: list[tuple[int, int]] = []  # rows of captions.npy
        self._rows: list[int] = []
        self._short: list[int] = []  # numbers of the documents of which a part is lost
        self._textless = 0
        self._prompts: list[tuple[int, InstructionPrompt]] = []  # number of the document, its prompt
        self._templated = False  # whether the chat template wrote a document
        self._bad: list[tuple[str, str]] = []  # reason and key of each sample that cannot be tokenised
        self._pixels: list[np.ndarray] = []  # images not yet encoded
        self._codes: list[np.ndarray] = []
        self._dtype = np.uint16 if vocabulary.size <= 1 << 16 else np.int32

    def add(self, samples: Iterable[RawSample]) -> None:
        """Tokenise samples and collect their tokens."""
        tokenizer, images = self.vocabulary.image, 0
        for sample in samples:
            picture = sample.image if tokenizer is not None else None
            if picture is None and not sample.texts:
                self._textless += 1
                continue
            try:
                ids = self._text_ids(sample)
            except NoBoundary as reason:
                self._skip(sample, str(reason))
                continue
            if sample.loss is not None:
                self._short.append(len(self._texts))
            self._texts.append(np.array(ids, dtype=self._dtype))
            self._rows.append(-1 if picture is None else images)
            if tokenizer is not None and picture is not None:
                images += 1
                self._pixels.append(crop_and_resize(picture, tokenizer.image_size))
                if len(self._pixels) == IMAGES_AT_ONCE:
                    self._encode(tokenizer)
        if tokenizer is not None and self._pixels:
            self._encode(tokenizer)

    def _skip(self, sample: RawSample, reason: str) -> None:
        if sample.loss is None:  # otherwise the sample has been counted as lost
            self._bad.append((reason, sample.key))

    def _text_ids(self, sample: RawSample) -> list[int]:
        if sample.instruction is None:
            return self._caption_ids(sample.captions)
        if sample.image is not None and self.vocabulary.image is None:
            raise UserError(f"sample '{sample.key}' asks about a picture: that needs data.image_tokenizer")
        ids, prompt = tokenised(self.vocabulary.text, sample.instruction, sample.hash)
        self._prompts.append((len(self._texts), prompt))
        self._templated = self._templated or bool(sample.instruction.messages)
        return ids

    def _caption_ids(self, captions: tuple[str, ...]) -> list[int]:
        """Return the ids of all captions of the next document, and record where the second and later ones start.

        Raises NoBoundary if the tokenizer returns no ids for a caption.
        """
        parts = [self.vocabulary.text.encode(caption) for caption in captions]
        if not all(parts):
            raise NoBoundary("the tokenizer drops the text")
        starts = accumulate(len(part) for part in parts[:-1])
        self._captions += [(len(self._texts), start) for start in starts]
        return [i for part in parts for i in part]

    def _encode(self, tokenizer: ImageTokenizer) -> None:
        codes = tokenizer.encode(scale_pixels(np.stack(self._pixels)).to(self.device))
        self._codes.append(self.vocabulary.image_code(codes).cpu().numpy().astype(self._dtype))
        self._pixels.clear()

    def write(self, folder: Path, origin: dict[str, Any], report: SampleReport) -> None:
        """Write the token shard to `folder`, unless another process has already done so.

        Samples that could not be tokenised are added to the report. Raises UserError if the files cannot be written.
        """
        for reason, key in self._bad:
            report.add_bad(reason, key)
        codes = self.vocabulary.image.num_codes if self.vocabulary.image else 0
        domains = sorted({prompt.domain for _, prompt in self._prompts})
        prompts = [
            (i, prompt.length, domains.index(prompt.domain), prompt.sample, prompt.bos + 2 * prompt.eos)
            for i, prompt in self._prompts
        ]
        later = [(i, *span) for i, prompt in self._prompts for span in prompt.later]
        if self._textless:
            report.unused[TEXTLESS] += self._textless
        arrays = {
            "text.npy": np.concatenate([np.empty(0, self._dtype), *self._texts]),
            "text_ends.npy": np.cumsum([len(text) for text in self._texts], dtype=np.int64),
            "captions.npy": np.array(self._captions, dtype=np.int64).reshape(-1, 2),
            "image.npy": np.concatenate([np.empty((0, codes), self._dtype), *self._codes]),
            "image_rows.npy": np.array(self._rows, dtype=np.int64),
            "prompts.npy": np.array(prompts, dtype=np.int64).reshape(-1, 5),
            "later.npy": np.array(later, dtype=np.int64).reshape(-1, 3),
        }
        manifest = {
            "format": TOKEN_SHARD_FORMAT,
            **origin,
            "vocabulary": self.vocabulary.fingerprint(),
            "made_with": self.vocabulary.describe(),
            "documents": len(self._texts),
            "text_tokens": arrays["text.npy"].size,
            "image_tokens": arrays["image.npy"].size,
            "domains": domains,
            "chat_template": self.vocabulary.text.chat.digest if self._templated else "",
            "short_documents": self._short,
            "samples": report.to_json(),
        }
        try:
            with new_folder(folder, shared=True) as partial:
                for name, array in arrays.items():
                    np.save(partial / name, array)
                manifest["files"] = {name: (partial / name).stat().st_size for name in arrays}
                write_json(partial / TOKEN_SHARD_MANIFEST, manifest)
        except OSError as error:
            if not (folder / TOKEN_SHARD_MANIFEST).is_file():  # otherwise another process was faster
                raise UserError(f"cannot write the token cache {folder}: {error}") from None
