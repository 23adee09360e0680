"""Writes docs/files.md, one row per file with its purpose and its public names: python -m tests.support.file_map"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.support import ROOT

PAGE = ROOT / "docs" / "files.md"
HEAD = """# Every file

Generated from the sources by `python -m tests.support.file_map`; a test keeps it up to date. The purpose is the
beginning of the module's docstring; the names are its public classes and functions. [Architecture](architecture.md)
says how the rooms fit together; [where](where.md) names the file of each decision.
"""


def page() -> str:
    """Return the page's Markdown."""
    rooms: dict[str, list[str]] = {}
    for path in sorted(ROOT.glob("moe_dist/**/*.py")) + sorted(ROOT.glob("launch/*.py")):
        if path.name != "__init__.py":
            rooms.setdefault(str(path.parent.relative_to(ROOT)), []).append(_python_row(path))
    rooms["slurm"] = [_row(path, _shell_purpose(path), ()) for path in sorted(ROOT.glob("slurm/*.sh"))]
    sections = (
        f"## {room}\n| file | purpose | names |\n|---|---|---|\n" + "\n".join(rows) for room, rows in rooms.items()
    )
    return HEAD + "\n" + "\n\n".join(sections) + "\n"


def _python_row(path: Path) -> str:
    tree = ast.parse(path.read_text())
    paragraphs = (ast.get_docstring(tree) or "").split("\n\n")
    purpose = " ".join(text for text in paragraphs[:3] if not text.startswith((" ", "Shape suffixes")))
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    names = [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    return _row(path, purpose, names)


def _shell_purpose(path: Path) -> str:
    """Return the first run of comment lines after the interpreter's and #SBATCH lines."""
    purpose: list[str] = []
    for line in path.read_text().splitlines():
        if line.startswith("# "):
            purpose.append(line.removeprefix("# "))
        elif purpose:
            break
    return " ".join(purpose)


def _row(path: Path, purpose: str, names: tuple[str, ...] | list[str]) -> str:
    text = re.sub(r"\s+", " ", purpose).replace("|", "\\|")
    return f"| `{path.relative_to(ROOT)}` | {text} | {', '.join(f'`{name}`' for name in names)} |"


if __name__ == "__main__":
    PAGE.write_text(page())
