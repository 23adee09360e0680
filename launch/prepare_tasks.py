"""Write multiple-choice items as task files of lm-evaluation-harness:

  python launch/prepare_tasks.py shards=data/multiple_choice out=data/tasks/words [split=validation]

Creates the folder OUT. Each domain gets a YAML file and files with its items. OUT/NAME.yaml groups all domains, where
NAME is the name of the folder. Both launch/lm_eval.py and lm_eval's own command line accept the YAML files.
"""

from __future__ import annotations

import sys
from typing import Any

from moe_dist.core.strict import apply_override, validate
from moe_dist.data.tasks.task_files import TaskFilesRecipe, write_task_files
from moe_dist.parallel.discovery import run_rank


def main(arguments: list[str]) -> None:
    settings: dict[str, Any] = {}
    for argument in arguments:
        apply_override(settings, argument)
    recipe = validate(TaskFilesRecipe, settings, "prepare_tasks.py")
    for task, count in write_task_files(recipe).items():
        print(f"{task}: {count} items")


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))
