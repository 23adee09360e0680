"""Our VQ image tokenizer (VQ-VAE, arXiv 1711.00937): a convolutional encoder, a quantizer and a decoder.

The quantizer is from the package vector_quantize_pytorch. By default, 64 x 64 pixels become 8 x 8 = 64 codes. The
network is so small that two CPU cores can train it in minutes: a patch embedding, then residual blocks at 1/4 and 1/8
of the resolution only.

Shape suffixes: B images, H and W pixels, h and w latent rows and columns, n = h * w codes of an image, D code width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from safetensors.torch import save
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize

from moe_dist.core.errors import UserError
from moe_dist.core.files import read_json, write_file
from moe_dist.core.strict import Positive, Strict, Width, validate
from moe_dist.core.tensor_files import read_safetensors
from moe_dist.data.tokenizers.pixels import in_chunks
from moe_dist.data.tokenizers.tokenizer_weights import (
    CONFIG,
    MAX_BLOCKS,
    MAX_SIDE,
    WEIGHTS,
    content_sha256,
    load_weights,
)

CHUNK = 32  # images encoded or decoded at once
PATCH = 4  # side of a patch of the patch embedding, in pixels
DOWNSAMPLING = 2 * PATCH  # side of the square that one code covers, in pixels
NORM_GROUPS = 8
DEAD_CODE = 0.25  # a code used by fewer vectors of a batch (moving average) is replaced by one of the vectors


class VQConfig(Strict):
    """The sizes of the tokenizer and the settings of its quantizer, stored in config.json."""

    type: Literal["moe_dist_vq"] = "moe_dist_vq"
    image_size: Annotated[Positive, Field(le=MAX_SIDE)] = 64  # side in pixels
    codebook_size: Width = 512
    code_width: Width = 32
    channels: tuple[Width, Width] = (32, 128)  # at 1/4 and at 1/8 of the resolution
    blocks: Annotated[Positive, Field(le=MAX_BLOCKS)] = 2  # residual blocks at each resolution
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.95  # of the codebook's moving averages
    commitment: Annotated[float, Field(ge=0)] = 0.25

    @model_validator(mode="after")
    def _sizes(self):
        if self.image_size % DOWNSAMPLING or any(width % NORM_GROUPS for width in self.channels):
            raise ValueError(f"image_size={self.image_size} and channels={self.channels} must be multiples of 8")
        return self


class Residual(nn.Sequential):
    """Residual block x + f(x), where f is a norm, a 3 x 3 convolution, a norm and a 1 x 1 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.GroupNorm(NORM_GROUPS, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(NORM_GROUPS, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class VQTokenizer(nn.Module):
    """An ImageTokenizer that can be trained (see vq_training.py), saved and loaded."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size, self.codebook_size = config.image_size, config.codebook_size
        self.grid = config.image_size // DOWNSAMPLING
        self.num_codes = self.grid**2
        fine, coarse = config.channels
        width, blocks = config.code_width, config.blocks
        self.encoder = nn.Sequential(
            nn.Conv2d(3, fine, PATCH, PATCH),
            *(Residual(fine) for _ in range(blocks)),
            nn.Conv2d(fine, coarse, 2, 2),
            *(Residual(coarse) for _ in range(blocks)),
            nn.GroupNorm(NORM_GROUPS, coarse),
            nn.Conv2d(coarse, width, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(width, coarse, 3, padding=1),
            *(Residual(coarse) for _ in range(blocks)),
            nn.Conv2d(coarse, 4 * fine, 1),
            nn.PixelShuffle(2),
            *(Residual(fine) for _ in range(blocks)),
            nn.GroupNorm(NORM_GROUPS, fine),
            nn.SiLU(),
            nn.Conv2d(fine, 3 * PATCH**2, 3, padding=1),
            nn.PixelShuffle(PATCH),
        )
        self.quantizer = VectorQuantize(
            width,
            config.codebook_size,
            decay=config.decay,
            commitment_weight=config.commitment,
            kmeans_init=True,
            threshold_ema_dead_code=DEAD_CODE,
            sync_codebook=False,
            accept_image_fmap=True,
        )

    def forward(self, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the reconstruction [B, 3, H, W], the codes [B, h, w] and the commitment loss (0-d)."""
        quantized_BDhw, codes_Bhw, commitment = self.quantizer(self.encoder(pixels_B3HW))
        return self.decoder(quantized_BDhw), codes_Bhw, commitment.sum()

    @torch.no_grad()
    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """Encode images in [-1, 1] as codes [B, n] (int64, row by row).

        The tokenizer must be in eval mode, because a call in training mode changes the codebook.
        """
        return in_chunks(lambda x: self.quantizer(self.encoder(x))[1].flatten(1), pixels_B3HW, CHUNK)

    @torch.no_grad()
    def decode(self, codes_Bn: Tensor) -> Tensor:
        """Decode codes to images [B, 3, H, W] in [-1, 1]."""
        codes_Bhw = codes_Bn.unflatten(1, (self.grid, self.grid))
        latent_BDhw = self.quantizer.get_codes_from_indices(codes_Bhw)
        return in_chunks(self.decoder, latent_BDhw, CHUNK).clamp(-1, 1)

    @property
    def sha256(self) -> str:
        """Return a digest of the tokenizer's settings and weights."""
        return content_sha256(self.config.model_dump(mode="json"), self)

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        write_file(folder / WEIGHTS, save(weights))
        write_file(folder / CONFIG, json.dumps(self.config.model_dump(mode="json"), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> VQTokenizer:
        """Load a saved tokenizer in eval mode.

        Raises UserError if a file is missing or damaged, if the weights do not match config.json, or if the tokenizer
        was never trained.
        """
        folder = Path(folder)
        config = validate(VQConfig, read_json(folder / CONFIG), str(folder / CONFIG))
        tokenizer = load_weights(lambda: cls(config), read_safetensors(folder / WEIGHTS), folder)
        if not tokenizer.quantizer._codebook.initted:  # the first pictures would choose the codes, on every rank others
            raise UserError(f"the image tokenizer in {folder} is not trained: its codebook is empty")
        return tokenizer
