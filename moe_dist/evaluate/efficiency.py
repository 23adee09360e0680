"""Eta (MoMa, arXiv 2407.21770, section 4): the ratio of the FLOPs that two models need for the same loss.

Shape suffixes: S steps of a run, W points of its smoothed curve.
"""

from __future__ import annotations

import numpy as np


def smoothed(values_S: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of every `window` consecutive steps, [W], where W = S - window + 1.

    Raises ValueError if S < window.
    """
    if len(values_S) < window:
        raise ValueError(f"{len(values_S)} steps are fewer than the window of {window}")
    return np.convolve(values_S, np.full(window, 1 / window), mode="valid")


def flops_to_reach(flops_W: np.ndarray, loss_W: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the FLOPs at which a loss curve first reaches each target loss.

    The curve is interpolated linearly between its points. The result is nan for a target that the curve never reaches.
    """
    lowest_W = np.minimum.accumulate(loss_W)
    after = np.searchsorted(-lowest_W, -targets)  # the first point at or below the target
    reached = after < len(lowest_W)
    after = np.where(reached, after, 0)
    before = np.maximum(after - 1, 0)
    drop = lowest_W[before] - lowest_W[after]
    share = np.divide(lowest_W[before] - targets, drop, out=np.ones_like(targets), where=drop > 0)
    return np.where(reached, flops_W[before] + share * (flops_W[after] - flops_W[before]), np.nan)


def eta(dense_flops_W: np.ndarray, dense_loss_W: np.ndarray, flops_W: np.ndarray, loss_W: np.ndarray) -> np.ndarray:
    """Compare the FLOPs that a dense model and another model need to reach the same loss.

    Returns the dense model's FLOPs divided by the other model's, [W]: one ratio per point of the dense model's curve.
    The loss of a point is the lowest that the dense model has reached up to that point. FLOPs are counted until a model
    first reaches this loss. A ratio above 1 means that the other model is better. The ratio is nan if the other model
    never reaches the loss.
    """
    targets = np.minimum.accumulate(dense_loss_W)
    return flops_to_reach(dense_flops_W, dense_loss_W, targets) / flops_to_reach(flops_W, loss_W, targets)
