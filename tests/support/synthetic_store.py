"""A token store and a vocabulary in memory, for tests of the code that follows tokenization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from moe_dist.config.recipe import DataConfig
from moe_dist.core.strict import validate
from moe_dist.data.tasks.instructions import InstructionPrompt

TEXT_IDS, IMAGE_IDS = 40, 16


class SmallVocabulary:
    """A vocabulary with the ids 0 PAD, 1 BOS, 2 EOS, 3 BOI, 4 EOI, then text, then image codes."""

    pad, bos, eos, boi, eoi = range(5)
    first_text, first_image = 5, 5 + TEXT_IDS
    size = 5 + TEXT_IDS + IMAGE_IDS
    modality_of = (torch.arange(size) >= first_image).long()


@dataclass
class MemoryDocument:
    text: np.ndarray
    image: np.ndarray | None
    prompt: InstructionPrompt | None = None
    further: tuple[np.ndarray, ...] = ()  # captions besides `text`


class MemoryStore:
    """A store in memory. part_sizes: number of documents of each corpus, if there are several."""

    digest = "in memory"

    def __init__(self, documents: list[MemoryDocument], part_sizes: Sequence[int] | None = None):
        self.documents = documents
        self.part_ends = np.cumsum(part_sizes or [len(documents)])
        self.domains = tuple(sorted({d.prompt.domain for d in documents if d.prompt}))
        self.has_image = np.array([d.image is not None for d in documents])
        self.lengths = np.array([len(d.text) + (0 if d.image is None else len(d.image)) for d in documents])

    def __len__(self) -> int:
        return len(self.documents)

    def replaced(self) -> list[str]:
        return []

    def document(self, index: int, choice: int = 0) -> MemoryDocument:
        document = self.documents[index]
        captions = (document.text, *document.further)
        return replace(document, text=captions[choice % len(captions)]) if document.further else document


def random_store(
    seed: int, *, pairs: int = 0, texts: int = 0, codes: int = 6, caption: int = 12, text: int = 40, captions: int = 1
) -> MemoryStore:
    """Return pairs and texts mixed, with lengths from 0 to the given maximum. Each has 1 to `captions` texts."""
    rng = np.random.default_rng(seed)
    v = SmallVocabulary

    def words(longest: int) -> np.ndarray:
        return rng.integers(v.first_text, v.first_image, rng.integers(0, longest + 1))

    documents = [MemoryDocument(words(caption), rng.integers(v.first_image, v.size, codes)) for _ in range(pairs)]
    documents += [MemoryDocument(words(text), None) for _ in range(texts)]
    documents = [documents[i] for i in rng.permutation(len(documents))]
    for document in documents if captions > 1 else ():
        longest = text if document.image is None else caption
        document.further = tuple(words(longest) for _ in range(rng.integers(captions)))
    return MemoryStore(documents)


def random_instructions(seed: int, *, count: int, pictures: float = 0.5, codes: int = 6) -> list[MemoryDocument]:
    """Return instructions of domains "a" and "b"; each begins with different words. 5 to 14 ids, and a fraction of them
    with an image.
    """
    rng = np.random.default_rng(seed)
    v = SmallVocabulary

    def document(number: int) -> MemoryDocument:
        prompt = [v.first_text + number % TEXT_IDS, v.first_text + number // TEXT_IDS]
        prompt += rng.integers(v.first_text, v.first_image, rng.integers(1, 6)).tolist()
        answer = rng.integers(v.first_text, v.first_image, rng.integers(2, 7)).tolist()
        image = rng.integers(v.first_image, v.size, codes) if rng.random() < pictures else None
        return MemoryDocument(
            np.array(prompt + answer), image, InstructionPrompt(len(prompt), "ab"[number % 2], 10**18 + number)
        )

    return [document(number) for number in range(count)]


def data_config(**changes) -> DataConfig:
    raw = {"shards": "unused", "text_tokenizer": "unused", "sequence_length": 32, "group_sequences": 2, "lanes": 4}
    return validate(DataConfig, {**raw, **changes}, "test", "data")
