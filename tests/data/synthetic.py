"""A token store and a vocabulary in memory, for tests of what comes after tokenisation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from moe_dist.config import DataConfig, validate

TEXT_IDS, IMAGE_IDS = 40, 16


class SmallVocabulary:
    """Ids: 0 PAD, 1 BOS, 2 EOS, 3 BOI, 4 EOI, then text, then image codes."""

    pad, bos, eos, boi, eoi = range(5)
    first_text, first_image = 5, 5 + TEXT_IDS
    size = 5 + TEXT_IDS + IMAGE_IDS
    modality_of = (torch.arange(size) >= first_image).long()


@dataclass
class MemoryDocument:
    text: np.ndarray
    image: np.ndarray | None


class MemoryStore:
    def __init__(self, documents: list[MemoryDocument]):
        self.documents = documents
        self.has_image = np.array([d.image is not None for d in documents])
        self.lengths = np.array([len(d.text) + (0 if d.image is None else len(d.image)) for d in documents])

    def __len__(self) -> int:
        return len(self.documents)

    def document(self, index: int) -> MemoryDocument:
        return self.documents[index]


def random_store(
    seed: int, *, pairs: int = 0, texts: int = 0, codes: int = 6, caption: int = 12, text: int = 40
) -> MemoryStore:
    """Pairs and texts mixed; lengths are uniform from 0 to the given maximum."""
    rng = np.random.default_rng(seed)
    v = SmallVocabulary

    def words(longest: int) -> np.ndarray:
        return rng.integers(v.first_text, v.first_image, rng.integers(0, longest + 1))

    documents = [MemoryDocument(words(caption), rng.integers(v.first_image, v.size, codes)) for _ in range(pairs)]
    documents += [MemoryDocument(words(text), None) for _ in range(texts)]
    return MemoryStore([documents[i] for i in rng.permutation(len(documents))])


def data_config(**changes) -> DataConfig:
    raw = {"shards": "unused", "text_tokenizer": "unused", "sequence_length": 32, "group_sequences": 2, "lanes": 4}
    return validate(DataConfig, {**raw, **changes}, "test", "data")
