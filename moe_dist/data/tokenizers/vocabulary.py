"""The vocabulary that joins text pieces, markers and image codes. Only this module defines the modality of an id.

  [0, P)  the text tokenizer's pieces, including its own PAD, BOS and EOS if it has them
  then    PAD, BOS and EOS if the text tokenizer lacks them
  then    with an image tokenizer: BOI and EOI (begin and end of image), then the image codes in order

A token is an image token if and only if it is an image code. All pieces and all markers, including BOI and EOI, are
text.
"""

from __future__ import annotations

import hashlib
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from moe_dist.core.batch import IMAGE, TEXT
from moe_dist.data.tokenizers.image_tokenizer import ImageTokenizer
from moe_dist.data.tokenizers.text_tokenizer import TextTokenizer

Codes = TypeVar("Codes", int, np.ndarray, Tensor)


class Vocabulary:
    """The ids of all text pieces, markers and image codes of a model. The attribute `size` is their number, V."""

    def __init__(self, text: TextTokenizer, image: ImageTokenizer | None = None) -> None:
        self.text, self.image = text, image
        own = {"pad": text.pad, "bos": text.bos, "eos": text.eos} | ({"boi": None, "eoi": None} if image else {})
        missing = [name for name, value in own.items() if value is None]
        ids = {name: value for name, value in own.items() if value is not None}
        ids |= {name: text.size + i for i, name in enumerate(missing)}
        self.pad, self.bos, self.eos = (ids[name] for name in ("pad", "bos", "eos"))
        self.boi, self.eoi = ids.get("boi"), ids.get("eoi")
        self.first_image_code: int = text.size + len(missing)
        self.size: int = self.first_image_code + (image.codebook_size if image else 0)
        self._digests = (text.sha256, image.sha256 if image else None)
        self.modality_of = torch.full((self.size,), TEXT)  # int64 [V]: index into MODALITIES
        self.modality_of[self.first_image_code :] = IMAGE

    def image_code(self, code: Codes) -> Codes:
        """Convert image codes to vocabulary ids. `code` is a single code, or an array or tensor of codes."""
        return code + self.first_image_code

    def fingerprint(self) -> str:
        """Return a SHA-256 of both tokenizers' content.

        If two vocabularies have equal fingerprints, they encode every text and every image as the same ids.
        """
        return hashlib.sha256(repr(self._digests).encode()).hexdigest()

    def describe(self) -> str:
        """Return a description of both tokenizers for use in a message.

        Example: `text tokenizer 1a2b3c4d (2048 pieces), image tokenizer 5e6f7a8b (64 x 64, 512 codes)`.
        """
        text_digest, image_digest = self._digests
        text = f"text tokenizer {text_digest[:8]} ({self.text.size} pieces)"
        if self.image is None or image_digest is None:
            return f"{text}, no image tokenizer"
        size = self.image.image_size
        return f"{text}, image tokenizer {image_digest[:8]} ({size} x {size}, {self.image.codebook_size} codes)"
