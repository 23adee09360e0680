"""Strict loading of an image tokenizer's weights, and a digest that identifies them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.core.errors import UserError

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def load_weights(module: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Copy tensors into the module's parameters and buffers. Raises UserError unless every name and shape matches."""
    expected = module.state_dict()
    for name, value in expected.items():
        if name not in tensors:
            raise UserError(f"the weights in {folder} do not match its {CONFIG}: '{name}' is missing")
        if tensors[name].shape != value.shape:
            shapes = f"{list(tensors[name].shape)}, not {list(value.shape)}"
            raise UserError(f"the weights in {folder} do not match its {CONFIG}: '{name}' has the shape {shapes}")
    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        raise UserError(f"the weights in {folder} do not match its {CONFIG}: '{unknown[0]}' is not expected")
    module.load_state_dict(tensors)


def content_sha256(config: dict[str, Any], module: nn.Module) -> str:
    """Return a digest of a tokenizer's settings and weights that does not depend on the files they are stored in."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
