"""Answers to the items of a large split, written to the disk in parts, so that an interrupted run can be continued.

A folder holds the finished parts and parts.json, which describes the model, the data and the layout. If a run has
another model, other data or another layout, it removes the parts and answers all items again.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from moe_dist.core.batch import Batch
from moe_dist.core.files import json_text, new_file, read_json, write_file
from moe_dist.core.tensor_files import LazyTensor, read_safetensors, write_safetensors
from moe_dist.data.tasks.choice_items import Choice
from moe_dist.evaluate.choice_accuracy import Answers, answers_of_all_ranks, merge_answers
from moe_dist.parallel.agreement import gather_objects, raise_on_all_ranks
from moe_dist.parallel.layout import Layout

BATCHES = 64  # micro-batches of each rank in one part
PARTS_ABOUT = "parts.json"


def answer_in_parts(
    forward: Callable,
    batches: Iterable[Batch],
    choices: Mapping[int, Choice],
    layout: Layout,
    folder: Path,
    about: Mapping[str, Any],
) -> Answers | None:
    """Let a model answer all items of the batches. Collective.

    Each part of the answers is written to `folder` when it is finished. A later call skips the finished parts. Returns
    all answers on the main rank, and None on other ranks. Raises UserError if there are no items.

    forward, choices: as in `answer` (choice_accuracy.py). about: a JSON object that identifies the model and the
    batches.
    """
    with raise_on_all_ranks():
        done = _finished(folder, {**about, "dp": layout.dp, "batches": BATCHES}) if layout.is_main else set()
    done = set().union(*gather_objects(done))
    for number, some in enumerate(_chunks(batches)):
        if number in done:
            continue
        answers = answers_of_all_ranks(forward, some, choices, layout)
        with raise_on_all_ranks():
            if layout.is_main and answers:
                _write(folder / f"{number:06d}.safetensors", merge_answers(answers))
    with raise_on_all_ranks():
        if not layout.is_main:
            return None
        return merge_answers([Answers(**read_safetensors(path)) for path in sorted(folder.glob("*.safetensors"))])


def _chunks(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    remaining = iter(batches)
    while some := list(islice(remaining, BATCHES)):
        yield some


def _finished(folder: Path, about: dict[str, Any]) -> set[int]:
    """Return the numbers of the finished parts in a folder.

    If the folder's parts.json is missing or differs from `about`, the folder is emptied and parts.json is written.
    """
    if not (folder / PARTS_ABOUT).is_file() or read_json(folder / PARTS_ABOUT) != about:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_file(folder / PARTS_ABOUT, json_text(about))
    done = {int(path.stem) for path in folder.glob("*.safetensors")}
    if done:
        print(f"{folder}: {len(done)} parts are finished already", file=sys.stderr, flush=True)
    return done


def _write(path: Path, answers: Answers) -> None:
    with new_file(path) as partial:
        write_safetensors(partial, {name: LazyTensor.of(tensor) for name, tensor in asdict(answers).items()})
