"""Prepare a corpus as WebDataset shards: python launch/prepare_data.py corpus=emoji out=data/emoji [size=64]

All keys other than `corpus` and `out` are settings of the corpus. They are listed in its class in moe_dist/corpora/.
"""

from __future__ import annotations

import sys
from typing import Any

from moe_dist.core.errors import UserError
from moe_dist.core.paths import path_setting
from moe_dist.core.strict import apply_override
from moe_dist.corpora.prepare_corpus import prepare
from moe_dist.parallel.discovery import run_rank


def main(arguments: list[str]) -> None:
    settings: dict[str, Any] = {}
    for argument in arguments:
        apply_override(settings, argument)
    missing = [key for key in ("corpus", "out") if key not in settings]
    if missing:
        raise UserError(f"argument {missing[0]}= is missing (prepare_data.py corpus=emoji out=DIR [key=value ...])")
    name, out = str(settings.pop("corpus")), path_setting("out", settings.pop("out"))
    record = prepare(name, settings, out)
    if record is None:
        print(f"{out}: already prepared")
    else:
        counts = ", ".join(f"{count} {split}" for split, count in record["samples"].items())
        domains = "".join(f"; {domain} {count}" for domain, count in record["domains"].items())
        print(f"{out}: {counts} samples{domains} ({record['licence']})")


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))
