"""Training of our VQ image tokenizer, and measures of its quality: reconstruction error and codebook use.

Shape suffixes: N images, B images of a batch, H and W pixels.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from moe_dist.core.errors import UserError
from moe_dist.core.strict import Count, Positive, Strict
from moe_dist.data.tokenizers.pixels import scale_pixels, to_pixels
from moe_dist.data.tokenizers.vq import VQConfig, VQTokenizer

GRID_COLUMNS = 16
EMA = 0.98  # decay of the moving average of the loss on the progress line


class VQTraining(Strict):
    """Training settings: AdamW with linear warm-up and cosine decay to zero."""

    steps: Positive = 2000
    batch_size: Positive = 16
    lr: Annotated[float, Field(gt=0)] = 2e-3
    warmup_steps: Count = 100
    max_images: Positive = 20_000  # number read into memory, from the first shards
    seed: int = 0


@dataclass(frozen=True, slots=True)
class VQQuality:
    """The reconstruction error and the codebook use of a tokenizer on a set of images."""

    images: int
    psnr: float  # dB, mean over images; pixels in [0, 1]
    l1: float  # mean absolute error of pixels in [0, 1]
    codes_used: int
    code_perplexity: float  # exp of the entropy of the codes

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.4g}" for name, value in asdict(self).items())


def train_vq(pixels_NHW3: np.ndarray, config: VQConfig, training: VQTraining) -> VQTokenizer:
    """Train a tokenizer on uint8 images [N, H, W, 3] and return it in eval mode.

    The loss is L1 + squared error + the quantizer's commitment loss. The codebook is initialised by k-means on a large
    first batch. It is then updated by moving averages, and unused codes are replaced. The result is the same if the
    images, the settings and the number of CPU threads are the same. Raises UserError if there are fewer images than
    training.batch_size, or if the loss becomes non-finite.
    """
    count, batch_size = len(pixels_NHW3), training.batch_size
    if count < batch_size:
        raise UserError(f"{count} images are too few to train a VQ tokenizer in batches of {batch_size}")
    with torch.random.fork_rng(devices=[]):  # the quantizer draws from the global generator
        torch.manual_seed(training.seed)
        tokenizer = VQTokenizer(config)
        optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=training.lr, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, training))
        _initialise_codebook(tokenizer, pixels_NHW3)
        with _progress() as progress:
            task, shown = progress.add_task("image tokenizer", total=training.steps, loss=float("nan")), float("nan")
            for _ in range(training.steps):
                loss = _train_step(tokenizer, optimizer, _batch(pixels_NHW3, batch_size))
                schedule.step()
                shown = loss if math.isnan(shown) else EMA * shown + (1 - EMA) * loss
                progress.update(task, advance=1, loss=shown)
    return tokenizer.eval()


def _train_step(tokenizer: VQTokenizer, optimizer: torch.optim.Optimizer, pixels_B3HW: Tensor) -> float:
    output_B3HW, _, commitment = tokenizer(pixels_B3HW)
    loss = F.l1_loss(output_B3HW, pixels_B3HW) + F.mse_loss(output_B3HW, pixels_B3HW) + commitment
    if not loss.isfinite():
        raise UserError("the VQ tokenizer's loss is not finite; lower training.lr")
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def _initialise_codebook(tokenizer: VQTokenizer, pixels_NHW3: np.ndarray) -> None:
    """Initialise the codebook by k-means over the encoder's outputs for random images.

    The number of images is chosen such that there are at least 8 outputs per code.
    """
    count = math.ceil(8 * tokenizer.codebook_size / tokenizer.num_codes)
    with torch.no_grad():
        tokenizer(_batch(pixels_NHW3, count))


def _batch(pixels_NHW3: np.ndarray, size: int) -> Tensor:
    return scale_pixels(pixels_NHW3[torch.randint(len(pixels_NHW3), (size,)).numpy()])


def _lr_factor(step: int, training: VQTraining) -> float:
    warmup = min(1.0, (step + 1) / max(1, training.warmup_steps))
    return warmup * 0.5 * (1 + math.cos(math.pi * step / training.steps))


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("loss {task.fields[loss]:.4f}"))


def measure(tokenizer: VQTokenizer, pixels_NHW3: np.ndarray) -> VQQuality:
    """Measure how well a tokenizer reconstructs uint8 images [N, H, W, 3]."""
    codes_Nn = tokenizer.encode(scale_pixels(pixels_NHW3))
    error_N3HW = (tokenizer.decode(codes_Nn) - scale_pixels(pixels_NHW3)) / 2
    psnr_N = -10 * error_N3HW.square().mean((1, 2, 3)).clamp_min(1e-10).log10()
    share = torch.bincount(codes_Nn.flatten(), minlength=tokenizer.codebook_size) / codes_Nn.numel()
    entropy = -torch.xlogy(share, share).sum()
    return VQQuality(
        images=len(pixels_NHW3),
        psnr=psnr_N.mean().item(),
        l1=error_N3HW.abs().mean().item(),
        codes_used=int((share > 0).sum()),
        code_perplexity=entropy.exp().item(),
    )


def reconstruction_grid(tokenizer: VQTokenizer, pixels_NHW3: np.ndarray) -> Image.Image:
    """Return a picture in which rows of original images alternate with rows of their reconstructions.

    Each row has GRID_COLUMNS images. Images that do not fill a row are left out.
    """
    output_NHW3 = to_pixels(tokenizer.decode(tokenizer.encode(scale_pixels(pixels_NHW3))))
    rows = []
    for start in range(0, len(pixels_NHW3) - GRID_COLUMNS + 1, GRID_COLUMNS):
        for images in (pixels_NHW3, output_NHW3):
            rows.append(np.concatenate(images[start : start + GRID_COLUMNS], axis=1))
    return Image.fromarray(np.concatenate(rows))
