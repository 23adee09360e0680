"""The interface for image tokenizers, and a function that loads one from its folder.

Shape suffixes: B images, H and W pixels, n codes of an image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moe_dist.core.errors import UserError
from moe_dist.core.extras import require_extra
from moe_dist.core.files import read_json
from moe_dist.data.tokenizers.tokenizer_weights import CONFIG
from moe_dist.data.tokenizers.vq import VQTokenizer


class ImageTokenizer(Protocol):
    """Interface for tokenizers that encode images as discrete codes and, if they have a decoder, decode codes.

    pixels.py converts images to the pixels that a tokenizer expects.
    """

    image_size: int  # pixels of one side
    num_codes: int  # n, row by row
    codebook_size: int

    @property
    def sha256(self) -> str:
        """Return a digest of the tokenizer's settings and weights."""

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """Encode images in [-1, 1] as codes [B, n] (int64). An image's codes do not depend on the rest of the batch."""

    def decode(self, codes_Bn: Tensor) -> Tensor:
        """Decode codes to images [B, 3, H, W] in [-1, 1]. Raises UserError if the tokenizer has no decoder."""

    def to(self, device: torch.device | str) -> ImageTokenizer:
        """Move the weights to a device and return the tokenizer."""


def load_image_tokenizer(folder: str | Path) -> ImageTokenizer:
    """Load our VQ tokenizer or Chameleon's from a folder. The folder's config.json says which one it is.

    Raises UserError if the folder is missing or damaged, or holds neither of these tokenizers.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no image tokenizer folder {folder} (data.image_tokenizer)")
    config = read_json(folder / CONFIG)
    if config.get("type") == "moe_dist_vq":
        return VQTokenizer.load(folder)
    if config.get("model_type") in ("chameleon_vqgan", "chameleon"):
        require_extra("transformers", "models", f"the image tokenizer {folder}")
        from moe_dist.data.tokenizers.chameleon import ChameleonVQ  # transformers takes seconds to import

        return ChameleonVQ.load(folder)
    raise UserError(f"{folder / CONFIG} describes neither a moe_dist VQ tokenizer nor a Chameleon model")
