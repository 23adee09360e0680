"""The output of a conversion: a checkpoint with only parameters, and the matching `model:` section for a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from moe_dist.checkpoint.stored_weights import write_tensors
from moe_dist.config.model_section import ModelConfig
from moe_dist.core.expert_rows import named_rows
from moe_dist.core.tensor_files import LazyTensor
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout

MODEL = "model.yaml"


def write_model(
    out: str | Path,
    model: ModelConfig,
    vocab_size: int,
    tensors: Mapping[str, LazyTensor],
    *,
    source: str,
    files: Mapping[str, bytes],
    state: Mapping[str, Any] | None = None,
) -> None:
    """Write the checkpoint `out`, and add model.yaml and `files` to it.

    tensors: the parameters of the model. source: a description of their origin, which the checkpoint records.
    files: the content of each file, keyed by path relative to `out`. state: further entries for the checkpoint's state,
    taken from the run that is converted.
    Raises UserError if no model can be built from `model`, or if `out` exists or cannot be written. Raises RuntimeError
    if the tensors' names or shapes do not match `model`.
    """
    expected, given = parameter_shapes(model, vocab_size), {name: tensor.shape for name, tensor in tensors.items()}
    if expected != given:
        differing = sorted(dict(set(expected.items()) ^ set(given.items())))
        raise RuntimeError(f"the conversion does not fit the model: {differing}")
    section = model.model_dump(mode="json", exclude_unset=True)
    about = {**(state or {}), "step": 0, "source": source, "config": {"model": section}}
    write_tensors(out, tensors, about, {MODEL: section_yaml(model, source).encode(), **files})


def section_yaml(model: ModelConfig, source: str) -> str:
    """Return the text of model.yaml: a comment that names the source, and the settings of `model`.

    Settings that are not set explicitly in `model` are left out.
    """
    section = {"model": model.model_dump(mode="json", exclude_unset=True)}
    return f"# the model of these weights ({source})\n" + yaml.safe_dump(section, sort_keys=False)


def parameter_shapes(model: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of an unsharded model.

    A parameter that stacks experts has one entry per expert, `NAME[global expert id]`. Raises UserError if no model can
    be built from the settings.
    """
    with torch.device("meta"):
        built = Transformer(model, vocab_size, Layout(), seed=0)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in built.named_parameters():
        shapes |= {key: tuple(value.shape) for key, value in named_rows(name, parameter).items()}
    return shapes
