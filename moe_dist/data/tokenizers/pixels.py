"""Converts images to the pixel values that an image tokenizer takes: centre crop, resize, scale to [-1, 1].

Shape suffixes: B images, H and W pixels, n codes of an image.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def crop_and_resize(image: Image.Image, size: int) -> np.ndarray:
    """Crop an RGB image to its largest centred square and resize it to [size, size, 3] uint8."""
    return np.array(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))


def scale_pixels(pixels_BHWC: np.ndarray | Tensor) -> Tensor:
    """Convert uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [-1, 1]."""
    return torch.as_tensor(pixels_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(images_B3HW: Tensor) -> np.ndarray:
    """Convert [B, 3, H, W] in [-1, 1] to uint8 [B, H, W, 3]. This is the inverse of scale_pixels."""
    return ((images_B3HW + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def in_chunks(function: Callable[[Tensor], Tensor], x_B: Tensor, chunk: int) -> Tensor:
    """Apply a function to chunks of exactly `chunk` rows, and join the results. The last chunk is padded with zeros.

    Kernels round differently for inputs of different shapes, and a rounding difference can change the code of an image.
    Because all chunks have the same shape, the codes of an image do not depend on the other images in the batch.
    """
    outputs = []
    for part in x_B.split(chunk):
        padded = torch.cat([part, part.new_zeros(chunk - len(part), *part.shape[1:])])
        outputs.append(function(padded)[: len(part)])
    return torch.cat(outputs)
