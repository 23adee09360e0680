"""Bitwise repeatable runs on a GPU (train.deterministic). Runs on CPU are always repeatable."""

from __future__ import annotations

import os

import torch


def make_deterministic() -> None:
    """Make torch use bitwise repeatable operations. Call it before anything runs on the device.

    The operation index_add and the backward pass of flash attention then add in a fixed order. The call must come first
    because cuBLAS reads its workspace setting from the environment when it starts.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # By default torch would also fill every allocation, to make reads of uninitialised memory repeatable.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
