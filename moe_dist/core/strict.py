"""Strict settings: immutable pydantic models, YAML, `section.key=value` overrides, and errors that name the key.

An unknown key, a key given twice, a wrong type or a value out of range raises UserError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_dist.core.errors import UserError, cut, did_you_mean

Fraction = Annotated[float, Field(ge=0, le=1)]
# Larger numbers are not meant: they would take hours or all memory before anything says so.
Positive = Annotated[int, Field(gt=0, le=10**9)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Width = Annotated[int, Field(gt=0, le=1 << 17)]  # a width of a model, or the number of its experts or heads
V = TypeVar("V")


class Strict(BaseModel):
    """Base class of all settings models: immutable, and strict about types, unknown keys and infinite numbers."""

    refused: ClassVar[Mapping[str, str]] = {}  # unsupported keys that a user may expect -> reason, after "key 'KEY' "
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


Settings = TypeVar("Settings", bound=Strict)


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads 1e-4 as a number and a date as text, as YAML 1.2 does."""

    yaml_implicit_resolvers = {  # noqa: RUF012, declared by PyYAML
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


# How numbers are written. YAML 1.1 has more integers and fractions: 010 is 8 there, 0x10 is 16, 1:30 is 90.
_DECIMAL = re.compile(r"[-+]?(0|[1-9]\d*|(\d+\.\d*|\.\d+|\d+(?=e))(e[-+]?\d+)?|\.inf|\.nan)", re.IGNORECASE)
_SURROGATE = re.compile("[\ud800-\udfff]")
MOST_VALUES = 100_000  # in a YAML document; a few nested aliases can stand for billions of values
_TEXT, _INTEGER, _MERGE = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "merge"))
_KINDS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML.

    Raises UserError if the text is not valid YAML or contains a value that settings do not allow. The message begins
    with `where`.
    """
    try:
        node = yaml.compose(text, _Loader)
        for number, (keys, part) in enumerate(_nodes(node, ())):
            if number == MOST_VALUES:
                raise UserError(f"{where}: more than {MOST_VALUES} values; an alias (*name) counts as a copy")
            if problem := _foreign(part):
                name = f"key '{'.'.join(keys)}': " if keys else ""
                raise UserError(f"{where}: {name}{problem}")
        return _Loader("").construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{where}: a value contains itself or is nested too deeply") from None


def _nodes(node: yaml.Node | None, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], yaml.Node]]:
    """Yield (path, node) for each node of a YAML document. The path consists of the keys that lead to the node.

    keys: the path of the argument `node`.
    """
    if node is None:
        return
    yield keys, node
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _nodes(key, keys)
            yield from _nodes(value, (*keys, cut(str(key.value))))
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield from _nodes(item, (*keys, str(number)))


def _foreign(node: yaml.Node) -> str | None:
    """Return an error message if a node's value is not allowed in settings, otherwise None."""
    if node.tag not in _KINDS:
        return f"{node.tag.rpartition(':')[2]} is not a kind of value that settings have"
    number = node.tag.endswith((":int", ":float"))
    if number and not _DECIMAL.fullmatch(node.value):
        return (
            f"{cut(node.value)} is not a decimal number; write it with the digits 0 to 9, or in quotes if it is a text"
        )
    if isinstance(node, yaml.ScalarNode) and _SURROGATE.search(node.value):
        return f"{cut(node.value)} has a lone surrogate, which is no character"
    return _wrong_key(node) if isinstance(node, yaml.MappingNode) else None


def _wrong_key(node: yaml.MappingNode) -> str | None:
    """Return an error message if a key of a mapping is neither text nor integer, or is given twice, otherwise None."""
    seen: set[str] = set()
    for key, _ in node.value:
        line = f"(line {key.start_mark.line + 1})"
        if key.tag not in (_TEXT, _INTEGER, _MERGE):
            name = f"'{cut(key.value)}'" if isinstance(key, yaml.ScalarNode) else "of several values"
            return f"the key {name} is not a text; write it in quotes {line}"
        name = key.value.lstrip("+") if key.tag == _INTEGER else key.value  # +1 is 1
        if name in seen:
            return f"key '{cut(name)}' is given twice {line}"
        seen.add(name)
    return None


def apply_override(data: dict[str, Any], override: str) -> None:
    """Apply one override `section.key=value` to a nested mapping, in place.

    Raises UserError if the override is not of this form, if its value is not valid YAML, or if a section in its key
    is a plain value in `data`.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override '{cut(override)}' is not of the form section.key=value")
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise UserError(f"override '{cut(override)}': '{parent}' is a value, not a section")
    data[last] = parse_yaml(text, f"override '{cut(override)}'")


@dataclass(frozen=True, slots=True)
class Fault:
    """One error in settings: the path of its key, and a sentence in which {key} is a placeholder for the full key."""

    keys: tuple[str, ...]
    text: str

    def sentence(self) -> str:
        key = ".".join(self.keys)
        return self.text.replace("{key}", key) if self.keys else self.text.removeprefix("key '{key}': ")


class Faults(ValueError):
    """One or more errors found by a validator that parses a part of the settings itself.

    If the validator raised a plain ValueError, pydantic would keep its text but lose the keys.
    """

    def __init__(self, faults: Iterable[Fault]):
        self.faults = tuple(faults)

    def below(self, key: str) -> tuple[Fault, ...]:
        """Return the faults with `key` added in front of their keys. If `key` is empty, the keys do not change."""
        return tuple(Fault((key, *fault.keys) if key else fault.keys, fault.text) for fault in self.faults)


def validate(model: type[Settings], data: Any, where: str, prefix: str = "") -> Settings:
    """Validate plain YAML data, and return it as an instance of `model`.

    If the data are invalid, raise one UserError that lists all problems. The message begins with `where`, and `prefix`
    precedes each key.
    """
    return within(where, lambda: nested(model, data), prefix)


def within(where: str, read: Callable[[], V], prefix: str = "") -> V:
    """Return read(). If it raises Faults, raise a UserError instead.

    The message begins with `where`, and `prefix` precedes each key.
    """
    try:
        return read()
    except Faults as faults:
        raise UserError(f"{where}: " + "; ".join(fault.sentence() for fault in faults.below(prefix))) from None


def nested(model: type[Settings], data: Any) -> Settings:
    """Validate plain YAML data, and return it as an instance of `model`. Raises Faults if the data are invalid.

    A validator that parses a part of the settings itself can call this function (see Faults).
    """
    try:
        return model.model_validate_json(json.dumps(data))  # JSON mode accepts a YAML list for a tuple
    except ValidationError as error:
        # If another setting is invalid, a default that depends on settings is reported, too.
        items = (item for item in error.errors() if item["type"] != "default_factory_not_called")
        raise Faults(fault for item in items for fault in _faults(model, item)) from None


def nested_items(data: Mapping[str, Any], read: Callable[[str, Any], V]) -> dict[str, V]:
    """Return the result of read(name, item) for each item of a mapping, keyed by name.

    If `read` raises Faults for an item, the remaining items are still read. Then the errors of all items are raised
    together as Faults, with the item's name in front of the keys of its errors.
    """
    values: dict[str, V] = {}
    faults: list[Fault] = []
    for name, item in data.items():
        try:
            values[name] = read(name, item)
        except Faults as found:
            faults += found.below(name)
    if faults:
        raise Faults(faults)
    return values


def pick(kinds: Mapping[str, V], name: Any, key: str, missing: str) -> V:
    """Return kinds[name]. Raises Faults if there is no such name.

    key: the settings key that the error message names. missing: the text of the message. If a known name is similar
    to `name`, the message also suggests the known name. Otherwise, the message lists all known names.
    """
    if isinstance(name, str) and name in kinds:
        return kinds[name]
    raise Faults([Fault((key,) if key else (), f"key '{{key}}': {missing}{_alternatives(name, kinds)}")])


def _alternatives(name: Any, known: Iterable[str]) -> str:
    return did_you_mean(str(name), known) or f": one of {', '.join(known)}"


def _faults(model: type[BaseModel], item: Any) -> Iterator[Fault]:
    """Yield the faults of one pydantic error. An error from a nested validator can contain several faults."""
    location, context = [str(part) for part in item["loc"]], item.get("ctx", {})
    keys = tuple(_walk(model, location)[0])
    if isinstance(inner := context.get("error"), Faults):
        yield from (Fault((*keys, *fault.keys), fault.text) for fault in inner.faults)
    elif item["type"] == "extra_forbidden":
        yield Fault(keys, _unknown(_walk(model, location[:-1])[1], location[-1]))
    elif item["type"] == "missing":
        yield Fault(keys, "key '{key}' is missing")
    elif item["type"] == "union_tag_not_found":
        yield Fault((*keys, "type"), "key '{key}' is missing")
    elif item["type"] == "union_tag_invalid":
        tag, known = context["tag"], [known.strip("' ") for known in context["expected_tags"].split(",")]
        yield Fault((*keys, "type"), f"key '{{key}}': there is no '{cut(tag)}'{_alternatives(tag, known)}")
    else:
        message = item["msg"].removeprefix("Value error, ")
        got = "" if isinstance(item["input"], dict | list | BaseModel) else f", got {cut(repr(item['input']))}"
        yield Fault(keys, f"key '{{key}}': {message[:1].lower()}{message[1:]}{got}")


def _unknown(section: Any, key: str) -> str:
    """Return the error message for a key that is not allowed in a section."""
    if reason := getattr(section, "refused", {}).get(key):
        return f"key '{{key}}' {reason}"
    return f"unknown key '{{key}}'{did_you_mean(key, getattr(section, 'model_fields', ()))}"


def _walk(model: Any, location: list[str]) -> tuple[list[str], Any]:
    """Return the keys of a pydantic error path as they are in the user's file, and the type at the end of the path.

    Pydantic adds a part to the path for each union member that it tried. These parts are not keys of the file, so they
    are left out.
    """
    keys, kind = [], _plain(model)
    for part in location:
        fields, inner = getattr(kind, "model_fields", {}), get_args(kind)
        if get_origin(kind) in (Union, UnionType):
            tagged = [member for member in inner if part in _tags(member)]
            kind = _plain(tagged[0]) if tagged else None
            continue
        keys.append(part)
        items = inner[0] if inner and part.isdecimal() else None
        kind = _plain(fields[part].annotation if part in fields else items)
    return keys, kind


def _plain(annotation: Any) -> Any:
    """Return the type T inside Annotated[T, ...] or Optional[T]. Return any other annotation unchanged."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    types = [kind for kind in get_args(annotation) if kind is not NoneType]
    return _plain(types[0]) if get_origin(annotation) in (Union, UnionType) and len(types) == 1 else annotation


def _tags(member: Any) -> tuple[str, ...]:
    field = getattr(member, "model_fields", {}).get("type")
    return get_args(field.annotation) if field is not None else ()
