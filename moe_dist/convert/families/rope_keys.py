"""The keys of config.json that describe the rotary embedding, as in transformers 4 and transformers 5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moe_dist.config.model_section import ModelConfig
from moe_dist.core.errors import UserError

SCALING_KEYS = {  # rope_type -> the keys of ours with the same names
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "truncate",
    ),
}


def rope_section(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the keys `rope_base` and `rope_scaling` of the `model:` section for a config.json.

    Without a scaling, `rope_scaling` is left out. As in transformers, the settings are those in rope_scaling, or those
    in rope_parameters if rope_scaling is empty. If they contain rope_theta, the value at the top level is ignored.
    Raises UserError if the rotary embedding covers only part of each head, differs between layers, or has an
    unsupported scaling.

    where: the source of the config, for error messages.
    """
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    settings = raw.get(key) or {}
    if any(isinstance(value, Mapping) for value in settings.values()):
        raise UserError(f"{where}: {key} has settings for each type of layer, which is not supported")
    for values in (raw, settings):
        if values.get("partial_rotary_factor") not in (1, None):
            raise UserError(f"{where}: partial_rotary_factor={values['partial_rotary_factor']} is not supported")
    section = {"rope_base": settings.get("rope_theta", raw["rope_theta"])}
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return section
    if kind not in SCALING_KEYS:
        raise UserError(f"{where}: {key}={kind!r} is not supported, only {', '.join(SCALING_KEYS)} and default are")
    return section | {"rope_scaling": {"type": kind} | _scaling(kind, settings, raw)}


def _scaling(kind: str, settings: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a scaling of the rotary embedding.

    If a setting is missing but can be computed from other keys of config.json, it is computed as in transformers.
    """
    found = {key: settings[key] for key in SCALING_KEYS[kind] if settings.get(key) is not None}
    original = "original_max_position_embeddings"
    if original in SCALING_KEYS[kind]:
        found[original] = raw.get(original, found.get(original, raw.get("max_position_embeddings")))
    own, all_dim = settings.get("mscale"), settings.get("mscale_all_dim")
    if kind == "yarn" and "attention_factor" not in found and own and all_dim:
        growth = 0.1 * math.log(max(found["factor"], 1))
        found["attention_factor"] = (growth * own + 1) / (growth * all_dim + 1)
    return found


def rope_json(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json that describe a model's rotary embedding."""
    base = {"rope_theta": model.rope_base}
    if model.rope_scaling is None:
        return {**base, "rope_parameters": {"rope_type": "default", **base}}
    settings = model.rope_scaling.model_dump(exclude_unset=True, exclude_none=True)
    scaling = {"rope_type": settings.pop("type"), **settings}
    return {**base, "rope_scaling": scaling, "rope_parameters": {**scaling, **base}}
