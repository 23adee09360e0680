"""Strict loading of an image tokenizer's weights, and a digest that identifies them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moe_dist.core.errors import UserError, cut

Module = TypeVar("Module", bound=nn.Module)
# Larger values in a config.json are not meant: they would take all memory, or hours to build.
MAX_SIDE = 4096  # pixels
MAX_SIZE = 1 << 17  # channels, codes
MAX_BLOCKS = 256
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def load_weights(make: Callable[[], Module], tensors: Mapping[str, Tensor], folder: Path) -> Module:
    """Build a module with the given parameters and buffers, in eval mode.

    Raises UserError if the module cannot be built, if a name or shape does not match, if a tensor is integer instead of
    floating-point or vice versa, or if a value is not finite. The module is first built on the meta device to compare
    names and shapes, because a module with wrong sizes might not fit in memory.
    """
    try:
        with torch.device("meta"):
            expected = make().state_dict()
    except (RuntimeError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG} describes no tokenizer that can be built: {cut(str(error))}") from None
    wrong = f"the weights in {folder} do not match its {CONFIG}: "
    for name, value in expected.items():
        if name not in tensors:
            raise UserError(f"{wrong}'{name}' is missing")
        if tensors[name].shape != value.shape:
            raise UserError(f"{wrong}'{name}' has the shape {list(tensors[name].shape)}, not {list(value.shape)}")
        if tensors[name].is_floating_point() != value.is_floating_point():
            raise UserError(f"{wrong}'{name}' has the type {tensors[name].dtype}, not {value.dtype}")
        if not tensors[name].isfinite().all():
            raise UserError(f"the weights in {folder} are damaged: '{name}' has values that are not finite")
    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        raise UserError(f"{wrong}'{unknown[0]}' is not expected")
    module = make()
    module.load_state_dict(tensors)
    return module.eval()


def content_sha256(config: dict[str, Any], module: nn.Module) -> str:
    """Return a digest of a tokenizer's settings and weights that does not depend on the files they are stored in."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
