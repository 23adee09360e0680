"""Rotary embedding (RoPE): the rotation angles of positions, with the scalings that extend a model to longer texts.

Shape suffixes: T tokens, H heads, d size per head, F frequencies (F = d / 2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_dist.config.model_section import ModelConfig
from moe_dist.config.rope_scaling import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling
from moe_dist.core.fused import fused


def rotary_angles(position_T: Tensor, *, head_size: int, base: float, scaling: RopeScaling | None = None) -> Tensor:
    """Compute the RoPE angles (Su et al., arXiv 2104.09864, eq. 15). Returns float32 [T, 1, 1, d].

    Both halves of the last dimension hold the same d/2 angles.
    """
    angle_TF = position_T[:, None].float() * frequencies(head_size, base, scaling, position_T.device)
    return torch.cat([angle_TF, angle_TF], dim=1)[:, None, None, :]


def frequencies(head_size: int, base: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """Compute the RoPE frequencies: for each pair of dimensions, the angle between two neighbouring positions.

    Returns float32 [F]. The unscaled frequencies are computed as 1 / base^x, as in the original code of imported
    models, because base^-x would be rounded differently.
    """
    exponent_F = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
    frequency_F = 1.0 / base**exponent_F
    match scaling:
        case None:
            return frequency_F
        case LinearScaling():
            return frequency_F / scaling.factor
        case Llama3Scaling():
            return _llama3(frequency_F, scaling)
        case YarnScaling():
            return _yarn(frequency_F, base, scaling)


def _llama3(frequency_F: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Divide low frequencies by `factor`, keep high ones, and interpolate in between (Llama 3.1)."""
    turns_F = scaling.original_max_position_embeddings / (2 * math.pi / frequency_F)  # in the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_F = ((turns_F - low) / (high - low)).clamp(0, 1)
    return (1 - kept_F) * frequency_F / scaling.factor + kept_F * frequency_F


def _yarn(frequency_F: Tensor, base: float, scaling: YarnScaling) -> Tensor:
    """Divide low frequencies by `factor`, keep high ones, and interpolate in between (YaRN).

    A frequency is high if its angle makes at least beta_fast full turns over the original context, and low if it makes
    at most beta_slow turns. Source: arXiv 2309.00071, eq. 17-19.
    """
    number = len(frequency_F)

    def dimension(turns: float) -> float:
        """Return the index of the frequency whose angle makes `turns` full turns over the original context.

        The index can be fractional.
        """
        ratio = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return number * math.log(ratio) / math.log(base)

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * number - 1)
    if first == last:
        last += 0.001  # a step instead of a ramp
    index_F = torch.arange(number, dtype=torch.float32, device=frequency_F.device)
    divided_F = ((index_F - first) / (last - first)).clamp(0, 1)
    return frequency_F / scaling.factor * divided_F + frequency_F * (1 - divided_F)


def magnitude(scaling: RopeScaling | None) -> float:
    """Return the factor by which rotated queries and keys are multiplied.

    It differs from 1 only in YaRN (arXiv 2309.00071, eq. 22).
    """
    if not isinstance(scaling, YarnScaling):
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0


def rotation(angle_T11d: Tensor, dtype: torch.dtype, magnitude: float = 1.0) -> Tensor:
    """Compute the cosines and signed sines that `rotate` needs, times `magnitude`. Returns [2, T, 1, d] in `dtype`.

    In the first half of the last dimension, the sines are negated. The result is computed once per micro-batch and
    shared by all layers.
    """
    sin_T1d = angle_T11d.sin().squeeze(1)
    first, second = sin_T1d.chunk(2, dim=-1)
    turn_2T1d = torch.stack([angle_T11d.cos().squeeze(1), torch.cat([-first, second], dim=-1)])
    return (turn_2T1d if magnitude == 1 else turn_2T1d * magnitude).to(dtype)


def rotation_of(config: ModelConfig, position_T: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the `rotation` of a model's queries and keys at the given positions."""
    scaling = config.rope_scaling
    angles_T11d = rotary_angles(position_T, head_size=config.size_per_head, base=config.rope_base, scaling=scaling)
    return rotation(angles_T11d, dtype, magnitude(scaling))


@fused
def rotate(x_THd: Tensor, cos_T1d: Tensor, sin_T1d: Tensor) -> Tensor:
    """Apply the rotary embedding: replace each head (x1, x2) by (x1 cos - x2 sin, x2 cos + x1 sin).

    Here, x1 and x2 are the two halves of the head. cos_T1d, sin_T1d: the two entries of the result of `rotation`.
    """
    return x_THd * cos_T1d + x_THd.roll(x_THd.shape[-1] // 2, -1) * sin_T1d
