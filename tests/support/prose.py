"""Phrases that the project's English avoids (CONTRIBUTING.md, "English"): `python -m tests.support.prose` lists them.

Reads docstrings, comments and other strings of moe_dist/ and launch/, and the prose of README.md and docs/ without its
code. Lines of these pages end before column 120; tables are excepted. Only Python's own modules are imported, so the
check takes two seconds.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from itertools import groupby

from tests.support import ROOT

COLUMNS = 119
BEGINNINGS = ("Of ", "What ", "How ", "Whether ")
PHRASES = (
    "looked at",
    "told",
    "stands beside",
    "so many",
    "alike",
    "rightly",
    "in small(?=[.,;:)]|$)",
    "by heart",
    r"(?<!there\s)is none",
    "has not as many",
    "for ever",
)
BANNED = re.compile(rf"\b(?:{'|'.join(PHRASES)})(?!\w)".replace(" ", r"\s+"))


def findings(path: str, source: str) -> Iterator[str]:
    """One sentence for each fault of a file; `path` is relative to the repository and decides how it is read."""
    if path.endswith(".md"):
        yield from _page_findings(path, source)
        return
    for line, docstring in _docstrings(source):
        if docstring.startswith(BEGINNINGS):
            yield f"{path}:{line}: a docstring begins with '{docstring.split()[0]}'"
    for line, text in [*_strings(source), *_comments(source)]:
        yield from _banned(path, line, text)


def project_findings() -> list[str]:
    """Return the faults of all files."""
    files = [file for folder in ("moe_dist", "launch") for file in sorted((ROOT / folder).rglob("*.py"))]
    files += [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [fault for file in files for fault in findings(str(file.relative_to(ROOT)), file.read_text())]


def _banned(path: str, line: int, text: str) -> Iterator[str]:
    """Yield a sentence for each banned phrase of a text that starts at `line`; a phrase may cross line ends."""
    for match in BANNED.finditer(text):
        phrase = " ".join(match[0].split())
        yield f"{path}:{line + text[: match.start()].count(chr(10))}: '{phrase}' (CONTRIBUTING.md, English)"


def _docstrings(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield node.body[0].lineno, docstring


def _strings(source: str) -> Iterator[tuple[int, str]]:
    """Yield docstrings and messages, an f-string's pieces one by one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def _comments(source: str) -> Iterator[tuple[int, str]]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    yield from _blocks([(t.start[0], t.string.lstrip("# ")) for t in tokens if t.type == tokenize.COMMENT])


def _page_findings(path: str, source: str) -> Iterator[str]:
    prose = _prose_lines(source)
    for line, text in prose:
        if len(text) > COLUMNS and not text.startswith("|"):
            yield f"{path}:{line}: {len(text)} columns; prose ends before column {COLUMNS + 1}"
    for line, text in _blocks(prose):
        yield from _banned(path, line, re.sub(r"`[^`\n]*`", "`", text))


def _blocks(lines: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Join lines whose numbers follow each other: (first number, text)."""
    for _, block in groupby(enumerate(lines), key=lambda item: item[1][0] - item[0]):
        numbered = [line for _, line in block]
        yield numbered[0][0], "\n".join(text for _, text in numbered)


def _prose_lines(source: str) -> list[tuple[int, str]]:
    """Return (number, text) of the lines outside fenced and indented code."""
    lines, fenced = [], False
    for number, text in enumerate(source.splitlines(), 1):
        if text.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not text.startswith("    "):
            lines.append((number, text))
    return lines


def main() -> int:
    faults = project_findings()
    print(*faults, sep="\n", end="\n" if faults else "")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
