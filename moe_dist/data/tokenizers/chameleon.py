"""Chameleon's image tokenizer (arXiv 2405.09818): 512 x 512 pixels -> 1024 codes (codebook of 8192).

The tokenizer is read from a local folder of Hugging Face weights. The folder holds a ChameleonVQVAE or a whole
Chameleon model, of which only the `vqmodel` is used. The transformers library ships the encoder and the codebook but no
decoder, so images can be encoded, but codes cannot be decoded.

Shape suffixes: B images, H and W pixels, n codes of an image.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig

from moe_dist.core.errors import UserError
from moe_dist.core.files import read_json
from moe_dist.core.tensor_files import read_safetensors
from moe_dist.data.tokenizers.pixels import in_chunks
from moe_dist.data.tokenizers.tokenizer_weights import (
    CONFIG,
    MAX_BLOCKS,
    MAX_SIDE,
    MAX_SIZE,
    content_sha256,
    load_weights,
)

CHUNK_PIXELS = 512 * 512  # pixels encoded at once: about 0.5 GiB of activations at Chameleon's width


class ChameleonVQ(nn.Module):
    """An ImageTokenizer that wraps transformers' ChameleonVQVAE."""

    def __init__(self, config: ChameleonVQVAEConfig, model: ChameleonVQVAE) -> None:
        super().__init__()
        self.config, self.model = config, model
        self.image_size, self.codebook_size = config.resolution, config.num_embeddings
        self.num_codes = (config.resolution // 2 ** (len(config.channel_multiplier) - 1)) ** 2

    @classmethod
    def load(cls, folder: str | Path) -> ChameleonVQ:
        """Load a tokenizer in eval mode from config.json and every .safetensors file.

        Raises UserError if config.json is invalid or missing, or if the weights do not match it.
        """
        folder = Path(folder)
        raw = read_json(folder / CONFIG)
        whole_model = raw.get("model_type") == "chameleon"
        try:
            config = _checked(ChameleonVQVAEConfig(**(raw.get("vq_config", {}) if whole_model else raw)))
        except Exception as error:  # transformers' own validation raises several kinds
            raise UserError(f"{folder / CONFIG} is not a ChameleonVQVAE configuration: {error}") from None
        tensors: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors |= read_safetensors(file, after="vqmodel." if whole_model else "")
        wanted = {name: value for name, value in tensors.items() if not name.startswith("decoder.")}
        return cls(config, load_weights(lambda: ChameleonVQVAE(config), wanted, folder)).eval()

    @torch.no_grad()
    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """Encode images with pixel values in [-1, 1] as codes, int64 [B, n], row by row."""
        chunk = max(1, CHUNK_PIXELS // self.image_size**2)
        return in_chunks(lambda x: self.model.encode(x).image_tokens.view(len(x), -1), pixels_B3HW, chunk)

    def decode(self, codes_Bn: Tensor) -> Tensor:
        """Raise UserError in every case, because transformers' ChameleonVQVAE has no decoder."""
        raise UserError("a ChameleonVQVAE holds no decoder: its image codes cannot be turned back into images")

    @property
    def sha256(self) -> str:
        """Return a digest of the tokenizer's settings and weights."""
        keys = ("resolution", "num_embeddings", "channel_multiplier", "attn_resolutions", "attn_type")
        return content_sha256({key: getattr(self.config, key) for key in keys}, self)


def _checked(config: ChameleonVQVAEConfig) -> ChameleonVQVAEConfig:
    """Return `config` unchanged.

    Raises ValueError if a size is not positive or is too large, or if the resolution cannot be halved between levels.
    """
    levels = len(config.channel_multiplier)
    for name in ("resolution", "base_channels", "latent_channels", "embed_dim", "num_embeddings"):
        if not 0 < getattr(config, name) <= MAX_SIZE:
            raise ValueError(f"{name}={getattr(config, name)} is not between 1 and {MAX_SIZE}")
    if not 0 < config.num_res_blocks * levels <= MAX_BLOCKS:
        raise ValueError(
            f"num_res_blocks={config.num_res_blocks} times {levels} levels is not between 1 and {MAX_BLOCKS}"
        )
    if config.resolution > MAX_SIDE or config.resolution % 2 ** (levels - 1):
        raise ValueError(f"resolution={config.resolution} is above {MAX_SIDE} or not divisible {levels - 1} times by 2")
    return config
