"""Random damage to bytes, to JSON values and to texts, drawn from a seeded generator."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

BLOCK = 512  # of a tar
NUMBERS = (0, -1, 1, 3, 2**31, 2**63, -(2**64), 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), True, None)
TEXTS = (
    "",
    " ",
    "x" * 3000,
    "\ud83d",
    "\x00",
    "a\nb",
    "caf\u00e9",
    "\ufeff",
    "null",
    "../..",
    "{}",
    "$UNSET_NAME",
    "~nobody_",
)
TREES = ([], {}, [[]], [None], {"type": "x"}, {"content": 5}, ["a", 1], {"": {"": ""}}, [[[[[["deep"]]]]]])
VALUES = (*NUMBERS, *TEXTS, *TREES)


def damage_bytes(draw: Random, content: bytes) -> bytes:
    """Change, remove, repeat, move or add a few bytes, of which many begin and end at a block of a tar."""
    unit = draw.choice((1, 1, 16, BLOCK))
    blocks = max(1, len(content) // unit)
    start = draw.randrange(blocks) * unit
    end = start + draw.choice((1, 1, 2, 4)) * unit
    before, part, after = content[:start], content[start:end], content[end:]
    noise = draw.randbytes(draw.choice((1, 1, 2, unit)))
    return draw.choice(
        (
            before + noise + content[start + len(noise) :],
            before + bytes(byte ^ 1 << draw.randrange(8) for byte in part) + after,
            before + after,
            before + part + part + after,
            before + noise + part + after,
            before,
            before + bytes(len(part)) + after,
            before + b"\xff" * len(part) + after,
            after + before,
            content + noise,
            content + bytes(unit),
            content + part,
        )
    )


def damage_value(draw: Random, value: Any) -> Any:
    """Return a copy of a JSON value in which one place is removed, renamed, exchanged, repeated or replaced."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return draw.choice(VALUES)
    parent, key = draw.choice(places)
    draw.choice(_CHANGES)(draw, parent, key)
    return value


def damage_text(draw: Random, text: str) -> bytes:
    """Return the bytes of a text in which lines are removed, repeated, exchanged or indented, or bytes are changed."""
    lines = text.splitlines(keepends=True) or [""]
    one, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    kind = draw.randrange(8)
    if kind == 0:
        lines[one] += lines[one]
    elif kind == 1:
        del lines[one]
    elif kind == 2:
        lines[one], lines[other] = lines[other], lines[one]
    elif kind == 3:
        lines[one] = draw.choice(("  ", "\t", "\ufeff", "- ", "# ", "? ", "&a ", "*a ", "!!set ", "%")) + lines[one]
    elif kind == 4:
        return "".join(lines).encode(draw.choice(("utf-16", "utf-8-sig", "utf-32")), errors="surrogatepass")
    elif kind == 5:
        return "".join(lines).replace("\n", draw.choice(("\r", "\r\n", "\x00", "\n\n"))).encode(errors="surrogatepass")
    else:
        return damage_bytes(draw, text.encode(errors="surrogatepass"))
    return "".join(lines).encode(errors="surrogatepass")


def damage_json(draw: Random, value: Any) -> bytes:
    """Return a JSON text whose value or bytes are damaged."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        value = damage_value(draw, value)
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5)
    if draw.random() < 0.2:
        text = text.replace('"', draw.choice(("'", '"', '""')), draw.randint(1, 9))
    content = text.encode(errors="surrogatepass")
    return damage_bytes(draw, content) if draw.random() < 0.3 else content


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return (container, key or index) of every value within a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in ((value, key), *_places(inner))]


def _replace(draw: Random, parent: Any, key: Any) -> None:
    parent[key] = draw.choice(VALUES)


def _remove(draw: Random, parent: Any, key: Any) -> None:
    del parent[key]


def _rename(draw: Random, parent: Any, key: Any) -> None:
    if isinstance(parent, dict):
        parent[draw.choice((f"{key}s", str(key)[1:], str(key).upper(), "type", "", "\ud83d", "caption"))] = parent.pop(
            key
        )
    else:
        parent.insert(draw.randint(0, len(parent)), parent[key])


def _exchange(draw: Random, parent: Any, key: Any) -> None:
    other = draw.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    parent[key], parent[other] = parent[other], parent[key]


def _wrap(draw: Random, parent: Any, key: Any) -> None:
    parent[key] = draw.choice(([parent[key]], {str(key): parent[key]}, str(parent[key]), [parent[key]] * 2))


def _scale(draw: Random, parent: Any, key: Any) -> None:
    value = parent[key]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    parent[key] = value * draw.choice((-1, 2, 1000, 10**9)) if number else draw.choice(VALUES)


_CHANGES: tuple[Callable[[Random, Any, Any], None], ...] = (
    _replace,
    _replace,
    _remove,
    _rename,
    _exchange,
    _wrap,
    _scale,
)
