"""Preparation of a corpus: downloading its packages, encoding its samples and writing them as shards.

The shards are written to a temporary folder. It gets its final name when it is complete, so a failed preparation leaves
no incomplete corpus.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from moe_dist.core.errors import UserError
from moe_dist.core.files import new_folder, read_json, write_json
from moe_dist.core.strict import validate
from moe_dist.corpora import BUILDERS, Corpus
from moe_dist.data.shards.tars import Sample, write_shards

RECORD = "corpus.json"
CORPUS_FORMAT = 1  # increase it when a builder's output changes


def prepare(name: str, settings: dict[str, Any], out: Path) -> dict[str, Any] | None:
    """Write the corpus called `name` as out/{train,validation,test}/*.tar.

    Returns the record written to out/corpus.json, or None if `out` already contains this corpus with the same settings.
    The downloads are kept in a folder next to `out`. Raises UserError if the name or a setting is invalid, if a
    download fails, or if `out` contains anything else or cannot be written.
    """
    if name not in BUILDERS:
        raise UserError(f"there is no corpus '{name}': it is one of {', '.join(BUILDERS)}")
    corpus = validate(BUILDERS[name], settings, f"corpus {name}")
    identity = {"corpus": name, "format": CORPUS_FORMAT, "settings": corpus.model_dump(mode="json")}
    if _is_prepared(out, identity):
        return None
    downloads = out.parent / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    samples = _samples(corpus, downloads, name)
    domains = Counter(sample.meta["domain"] for sample in samples if "domain" in sample.meta)
    try:
        with new_folder(out, shared=True) as partial:
            record = identity | {
                "licence": corpus.licence,
                "samples": write_shards(samples, partial),
                "domains": dict(sorted(domains.items())),  # only instructions have domains
            }
            write_json(partial / RECORD, record)
    except OSError as error:
        raise UserError(f"cannot put the prepared corpus at {out}: {error.strerror or error}") from None
    return record


def _is_prepared(out: Path, identity: dict[str, Any]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / RECORD).is_file():
        raise UserError(f"{out} is not empty and not a prepared corpus: choose another out= or remove it")
    found = read_json(out / RECORD)
    if any(found.get(key) != value for key, value in identity.items()):
        was = {key: found.get(key) for key in identity}
        raise UserError(f"{out} was prepared with other settings ({json.dumps(was)}): choose another out= or remove it")
    return True


def _samples(corpus: Corpus, downloads: Path, name: str) -> list[Sample]:
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns) as progress:
        task = progress.add_task(f"{name}: downloading packages", total=None)
        corpus.fetch(downloads)
        progress.update(task, description=f"{name}: reading packages")
        entries = corpus.entries(downloads)
        progress.remove_task(task)
        encoded = (corpus.sample(entry) for entry in progress.track(entries, description=f"{name}: encoding samples"))
        return [sample for sample in encoded if sample is not None]
