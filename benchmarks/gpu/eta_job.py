"""One training job of the efficiency study on one GPU, and the file of its curve. Has no slow imports."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LOSSES = ("loss", "loss/text", "loss/image")


@dataclass(frozen=True)
class Job:
    """One process's model, rate and length."""

    name: str
    rate: float  # peak learning rate; linear decay to a hundredth of it at the last step
    steps: int
    evaluations: int  # of the held-out loss, evenly spaced
    inputs: str
    file: str  # where the curve goes
    deadline: float  # seconds since the epoch
    overrides: list[str] = field(default_factory=list)
    beside: int = 1  # processes that share the card
    command: str = ""  # what the user typed

    def settings(self) -> dict[str, Any]:
        """Return the settings that must be equal for a finished curve to be reused."""
        same = ("name", "rate", "steps", "evaluations", "overrides")
        return {key: value for key, value in asdict(self).items() if key in same}

    def is_done(self) -> bool:
        found = read_curve(Path(self.file))
        return bool(found) and found["done"] and found["settings"] == self.settings()


def read_curve(file: Path) -> dict[str, Any]:
    """Return the curve in a file; {} if there is none."""
    return json.loads(file.read_text()) if file.exists() else {}
