"""Strict settings: frozen pydantic models, YAML and `section.key=value` overrides, and errors that name the key.

An unknown key, a wrong type or a value out of range is a UserError of one sentence. A leaf: imports nothing of ours but
the error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_dist.core.errors import UserError, did_you_mean

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    """Base of every settings model: immutable, no coercion, no unknown keys, no infinite numbers."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


Settings = TypeVar("Settings", bound=Strict)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: 1e-4 is a number (YAML 1.1 reads it as a string); a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise UserError(f"key '{key_node.value}' is given twice (line {key_node.start_mark.line + 1})")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """Raises UserError, which begins with `where`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in a nested mapping, in place."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override '{override}' is not of the form section.key=value")
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise UserError(f"override '{override}': '{parent}' is a value, not a section")
    data[last] = parse_yaml(text, f"override '{override}'")


def validate(model: type[Settings], data: Any, where: str, prefix: str = "") -> Settings:
    """Validate plain YAML data; every problem becomes one UserError that names the key under `prefix`."""
    try:
        return model.model_validate_json(json.dumps(data))  # JSON mode: a YAML list may fill a tuple
    except TypeError as error:  # YAML knows values that JSON does not, such as dates
        raise UserError(f"{where}: {error}") from None
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_explain(model, item, prefix) for item in error.errors())) from None


def _explain(model: type[BaseModel], item: Any, prefix: str) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(filter(None, [prefix, *_walk(model, location)[0]]))
    if item["type"] == "extra_forbidden":
        _, section = _walk(model, location[:-1])
        return f"unknown key '{key}'{did_you_mean(location[-1], getattr(section, 'model_fields', ()))}"
    if item["type"] == "missing":
        return f"key '{key}' is missing"
    message = item["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(item["input"], dict | list) else f", got {item['input']!r}"
    return f"key '{key}': {message[0].lower()}{message[1:]}{shown}" if key else message


def _walk(model: Any, location: list[str]) -> tuple[list[str], Any]:
    """The keys of a path as the user's file has them, and the model at its end, if it is one.

    pydantic puts the tag of a discriminated union into the path; a user's file has no such key.
    """
    keys = []
    for part in location:
        field = getattr(model, "model_fields", {}).get(part)
        members = [m for m in getattr(model, "__args__", ()) if hasattr(m, "model_fields")]
        member = next((m for m in members if part in m.model_fields["type"].annotation.__args__), None)
        if field is None and member is not None:
            model = member
            continue
        keys.append(part)
        optional = [of for of in getattr(field and field.annotation, "__args__", ()) if of is not type(None)]
        model = optional[0] if len(optional) == 1 else field and field.annotation
    return keys, model
