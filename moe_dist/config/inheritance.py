"""Inheritance of recipes: a recipe with `extends: base.yaml` at the top lists only its differences from base.yaml.

The path of the base is relative to the folder of the recipe that extends it. Mappings are merged key by key. A value
that is not a mapping, or is a mapping with a different `type`, replaces the base's value. A base may itself extend a
recipe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_dist.core.errors import UserError, cut
from moe_dist.core.paths import expand
from moe_dist.core.strict import parse_yaml


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe, merge it with the recipes that it extends, and return plain YAML data.

    Raises UserError if one of these files is missing or is not a mapping, or if recipes extend each other in a circle.
    """
    return _read(path, ())


def _read(path: Path, before: tuple[Path, ...]) -> dict[str, Any]:
    """Read a recipe and merge it with its bases.

    before: the recipes that led to this one, used to detect a circle. Each extends the next, and the last one extends
    the recipe at `path`.
    """
    data = parse_yaml(_text(path), str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path}: a recipe must be a mapping of sections")
    if "extends" not in data:
        return data
    base = data.pop("extends")
    if not isinstance(base, str):
        raise UserError(f"{path}: key 'extends': give the path of one recipe, not {base!r}")
    try:
        source, chain = path.parent / expand(base), (*before, path)
        circular, exists = source.resolve() in [recipe.resolve() for recipe in chain], source.is_file()
    except (ValueError, OSError) as error:  # OSError: the name is too long
        raise UserError(f"{path}: key 'extends': {cut(str(error))}") from None
    if circular:
        circle = " -> ".join(str(recipe) for recipe in (*chain, source))
        raise UserError(f"{path}: key 'extends': recipes extend each other in a circle: {circle}")
    if not exists:
        raise UserError(f"{path}: key 'extends': there is no recipe {source}")
    return merge(_read(source, chain), data)


def merge(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `base` with `own` merged into it. If both set a key, the value from `own` is used."""
    return base | {key: _merged(base.get(key), value) for key, value in own.items()}


def _merged(base: Any, own: Any) -> Any:
    both = isinstance(base, dict) and isinstance(own, dict)
    return merge(base, own) if both and own.get("type", base.get("type")) == base.get("type") else own


def _text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"there is no configuration file {path}")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"the configuration file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"the configuration file {path} is not UTF-8 text (byte {error.start})") from None
