"""Findings of the GPU check, as lines of JSON and a table. Imports neither torch nor moe_dist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent


class Findings:
    """The findings: one line of gpu_check.jsonl each, with part, what, result and numbers. Results in capitals are
    failures.
    """

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.file = self.folder / "gpu_check.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)

    def clear(self) -> None:
        self.file.write_text("")

    def note(self, part: str, what: str, result: str, **numbers: Any) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({"part": part, "what": what, "result": result, **numbers}) + "\n")
        print(f"  {part}: {what}: {result} {numbers or ''}", flush=True)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.file.read_text().splitlines()]

    def failures(self) -> list[dict[str, Any]]:
        return [line for line in self.lines() if line["result"].split()[0].isupper()]

    def write_table(self) -> str:
        rows = ["| part | what | result | numbers |", "|---|---|---|---|"]
        for line in self.lines():
            numbers = ", ".join(f"{k} {v}" for k, v in line.items() if k not in ("part", "what", "result"))
            rows.append(f"| {line['part']} | {line['what']} | {line['result']} | {numbers} |")
        text = "\n".join(rows) + "\n"
        (self.folder / "gpu_check.md").write_text(text)
        return text
