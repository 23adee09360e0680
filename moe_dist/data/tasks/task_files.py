"""Multiple-choice items as task files for EleutherAI's lm-evaluation-harness.

Each domain becomes a task. A YAML file describes the task, and JSON-lines files contain its items. Another YAML file
describes the group of all tasks. The library `datasets` reads the items without network access.

The prompts and options are those of training, so a task asks the same questions as launch/multiple_choice.py.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from moe_dist.core.errors import UserError
from moe_dist.core.files import new_folder
from moe_dist.core.paths import Paths, PathText
from moe_dist.core.strict import Strict
from moe_dist.data.shards.tars import Split, iterate, resolve_shards
from moe_dist.data.tasks.choice_items import written_options

EXAMPLES = 100  # number of training items of a domain from which a task's examples are drawn
METRICS = ("acc", "acc_norm")
Item = dict[str, Any]


class TaskFilesRecipe(Strict):
    """Settings of launch/prepare_tasks.py."""

    shards: Paths  # shards with multiple-choice items, as in data.shards
    out: PathText  # the folder to create; its name is the name of the group and the beginning of the tasks' names
    split: Split = "validation"  # the items to ask


def write_task_files(recipe: TaskFilesRecipe) -> dict[str, int]:
    """Write the task files of a corpus. Returns the number of items of each task.

    The YAML files contain the absolute paths of the items' files. If the folder `out` is moved, the task files must be
    written again.
    Raises UserError if a sample is not a multiple-choice item, if it has a picture, or if a domain is not a valid name.
    Also raises UserError if `out` exists, does not end in a valid name, or cannot be written.
    """
    out = Path(recipe.out).resolve()
    if not re.fullmatch(r"[\w-]+", out.name):
        raise UserError(f"out={recipe.out}: the name of the folder may have letters, digits, '_' and '-' only")
    if out.exists():
        raise UserError(f"{recipe.out} exists already")
    items = _read(recipe.shards, recipe.split)
    examples = _read(recipe.shards, "train")
    try:
        with new_folder(out) as partial:
            for domain, asked in items.items():
                _write_lines(partial / f"{domain}.jsonl", asked)
                _write_lines(partial / f"{domain}.examples.jsonl", list(islice(examples[domain], EXAMPLES)))
                _write_yaml(partial / f"{domain}.yaml", _task(out, domain, bool(examples[domain])))
            _write_yaml(partial / f"{out.name}.yaml", _group(out.name, list(items)))
    except OSError as error:
        raise UserError(f"cannot write {recipe.out}: {error}") from error
    return {f"{out.name}_{domain}": len(asked) for domain, asked in items.items()}


def _read(shards: str | Sequence[str], split: Split) -> dict[str, list[Item]]:
    """Return a dict from each domain to its items in the split. The domains are in alphabetical order."""
    items: dict[str, list[Item]] = defaultdict(list)
    for shard in resolve_shards(shards, split):
        for sample in iterate(shard):
            if sample.instruction is None or sample.image is not None:
                raise UserError(f"{shard.url}: the sample {sample.key} is not a multiple-choice item without a picture")
            options, correct = written_options(sample.instruction)
            item = {"prompt": sample.instruction.prompt, "options": options, "correct": correct}
            items[sample.instruction.domain].append({"key": sample.key, **item})
    for domain in items:
        if not re.fullmatch(r"[\w-]+", domain):
            raise UserError(f"the domain '{domain}' may have letters, digits, '_' and '-' only, to name a task")
    return defaultdict(list, sorted(items.items()))


def _task(out: Path, domain: str, has_examples: bool) -> dict[str, Any]:
    files = {"test": str(out / f"{domain}.jsonl"), "train": str(out / f"{domain}.examples.jsonl")}
    return {
        "task": f"{out.name}_{domain}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files if has_examples else {"test": files["test"]}},
        "test_split": "test",
        "fewshot_split": "train" if has_examples else "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "options",
        "doc_to_target": "correct",
        "target_delimiter": "",  # the options begin with their own blank
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS],
    }


def _group(name: str, domains: Sequence[str]) -> dict[str, Any]:
    """Return the content of the YAML file for the group of all tasks.

    The metrics of the group are means over the items of all tasks.
    """
    return {
        "group": name,
        "task": [f"{name}_{domain}" for domain in domains],
        "aggregate_metric_list": [{"metric": metric, "weight_by_size": True} for metric in METRICS],
    }


def _write_lines(path: Path, items: Sequence[Item]) -> None:
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
