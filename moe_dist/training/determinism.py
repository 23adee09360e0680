"""Bitwise repeatable runs on a GPU (train.deterministic). On CPU they are repeatable anyway."""

from __future__ import annotations

import os

import torch


def make_deterministic() -> None:
    """Let torch choose operations that give the same bits every time. Call it before anything runs on the device.

    index_add and flash attention's backward then add in a fixed order. cuBLAS reads its workspace setting from the
    environment when it starts.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Or torch would write every allocation once, to make reads of uninitialised memory repeatable.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
