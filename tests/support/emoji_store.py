"""Token stores of the real emoji pairs: SentencePiece text, and images as 8 x 8 cells of 27 colours instead of VQ
codes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
from PIL import Image

from moe_dist.data.shards.samples import to_rgb
from moe_dist.data.shards.tars import Sample
from moe_dist.data.tokenizers.text_tokenizer import train_text_tokenizer
from moe_dist.data.tokenizers.vocabulary import Vocabulary
from tests.support.synthetic_store import MemoryDocument, MemoryStore

COLOURS = SimpleNamespace(codebook_size=27, sha256="colours", image_size=8)


def emoji_vocabulary(samples: Sequence[Sample], folder) -> Vocabulary:
    captions = [s.caption for s in samples if s.split == "train" and s.caption]
    return Vocabulary(train_text_tokenizer(captions, folder / "text.model", vocab_size=600), COLOURS)


def emoji_store(samples: Sequence[Sample], split: str, vocabulary: Vocabulary) -> MemoryStore:
    def codes(png: bytes) -> np.ndarray:
        thirds = np.asarray(to_rgb(Image.open(io.BytesIO(png))).resize((8, 8), Image.Resampling.BOX)) // 86
        return vocabulary.image_code((thirds.reshape(64, 3) @ [9, 3, 1]).astype(np.int64))

    return MemoryStore(
        [
            MemoryDocument(np.array(vocabulary.text.encode(s.caption), dtype=np.int64), codes(s.png))
            for s in samples
            if s.split == split
        ]
    )
