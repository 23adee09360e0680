"""Evaluate a run on tasks of EleutherAI's lm-evaluation-harness: launch/lm_eval.py RUN --tasks TASK [TASK ...]

  --tasks hellaswag "mmlu_*"        names of tasks and groups that lm_eval knows (* for any text)
  --tasks data/tasks/words/words.yaml     YAML files of your own tasks and groups

Reads RUN/config.yaml and the run's newest checkpoint, and writes RUN/lm_eval.json (metrics) and RUN/lm_eval.jsonl (the
answer to every document). Runs as a single process, or under any launcher if parallel.expert divides the number of
processes; the answers do not depend on the layout. Overrides of the recipe (section.key=value) go directly after RUN.
The model reads at most data.sequence_length tokens.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moe_dist.core.files import json_text, write_file
from moe_dist.core.strict import validate
from moe_dist.harness.answering import AnsweringModel
from moe_dist.harness.task_suite import Results, TaskMetric, TaskSettings, TaskSuite, task_metrics
from moe_dist.metrics.run_folder import RunFolder
from moe_dist.parallel.agreement import raise_on_all_ranks
from moe_dist.parallel.discovery import is_main_process, run_rank
from moe_dist.training.trained_run import TrainedRun


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="names or YAML files")
    parser.add_argument("--fewshot", type=int, metavar="N", help="examples before each document (default: the task's)")
    parser.add_argument("--limit", type=int, metavar="N", help="documents of each task (default: all)")
    parser.add_argument("--chat", action="store_true", help="apply the tokenizer's chat template")
    parser.add_argument("--unsafe-code", action="store_true", help="allow tasks that run code that the model writes")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    arguments = parser.parse_intermixed_args(argv)
    evaluate_tasks(arguments)


def evaluate_tasks(arguments: argparse.Namespace) -> None:
    """Evaluate a run on tasks, print the metrics and write the results to the run folder. Collective."""
    folder = RunFolder(arguments.run)
    found = TrainedRun.find(folder, arguments.overrides)
    with raise_on_all_ranks():
        given = {name: getattr(arguments, name) for name in TaskSettings.model_fields}
        settings = validate(TaskSettings, given, "lm_eval.py")
    suite = TaskSuite.load(settings, is_main=is_main_process())
    run = found.open()
    with raise_on_all_ranks():
        model = replace(AnsweringModel.of(run.config, run.model, run.vocabulary, run.layout), shown=True)
    results = suite.evaluate(model, run.config.data.text_tokenizer)
    with raise_on_all_ranks():
        if run.layout.is_main:
            metrics = task_metrics(results)
            write_results(folder, run.step, settings, results, metrics)
            Console().print(table(metrics, run.step))


def write_results(
    folder: RunFolder, step: int, settings: TaskSettings, results: Results, metrics: list[TaskMetric]
) -> None:
    answers = [{"task": task, **sample} for task, of_task in results["samples"].items() for sample in of_task]
    lines = "".join(json.dumps(answer, default=str, ensure_ascii=False) + "\n" for answer in answers)
    write_file(folder.path / "lm_eval.jsonl", lines)
    record = {
        "step": step,
        "settings": settings.model_dump(mode="json"),
        "versions": results["versions"],
        "metrics": [{"task": m.task, "metric": m.name, "value": m.value, "interval_95": m.interval} for m in metrics],
    }
    write_file(folder.path / "lm_eval.json", json_text(record))


def table(metrics: list[TaskMetric], step: int) -> Table:
    grid = Table("task", "metric", "value [95 % interval]", title=f"tasks after {step} steps", title_justify="left")
    for metric in metrics:
        interval = "" if metric.interval is None else " [{:.4f}, {:.4f}]".format(*metric.interval)
        grid.add_row(metric.task, metric.name, f"{metric.value:.4f}{interval}")
    return grid


if __name__ == "__main__":
    run_rank(lambda: main(sys.argv[1:]))
