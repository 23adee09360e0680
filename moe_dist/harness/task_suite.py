"""Tasks of lm_eval: loading them by name or from a file, evaluating a model on them, and their metrics.

Only rank 0 loads the tasks and computes the metrics.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from moe_dist.core.errors import UserError, did_you_mean
from moe_dist.core.extras import require_extra
from moe_dist.core.strict import Count, Positive, Strict
from moe_dist.evaluate.intervals import Z95, Interval, wilson
from moe_dist.harness.answering import AnsweringModel
from moe_dist.harness.random_state import keep_random_state
from moe_dist.harness.task_text import TaskText, load_task_text
from moe_dist.harness.team import Team
from moe_dist.parallel.agreement import raise_on_all_ranks

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

FEWSHOT_SEED = 1234  # the default of lm_eval
BOOTSTRAPS = 1000  # samples for standard errors without a formula; lm_eval's 100,000 would take longer than the model
Results = dict[str, Any]


class TaskSettings(Strict):
    """Settings of an evaluation on tasks."""

    tasks: Annotated[tuple[str, ...], Field(strict=False)]  # names (with * for any text) and YAML files
    limit: Positive | None = None  # number of documents of each task; None: all
    fewshot: Count | None = None  # number of examples before each document; None: as the task says
    chat: bool = False  # apply the tokenizer's chat template
    unsafe_code: bool = False  # allow tasks that run code which the model writes


@dataclass(frozen=True, slots=True)
class TaskSuite:
    """Loaded tasks and the settings of their evaluation. Only rank 0 loads tasks."""

    settings: TaskSettings
    loaded: TaskDict | None

    @classmethod
    def load(cls, settings: TaskSettings, *, is_main: bool) -> TaskSuite:
        """Load the tasks and their data on rank 0. Collective.

        Raises UserError if lm_eval is not installed, if a task or file does not exist, or if a task's data cannot be
        loaded.
        """
        loaded = None
        with raise_on_all_ranks(patient=True):  # a task may prepare its data for a long time
            if is_main:
                _require_lm_eval()
                with keep_random_state():
                    loaded = load_tasks(settings)
        return cls(settings, loaded)

    def evaluate(self, model: AnsweringModel, tokenizer: str) -> Results:
        """Evaluate a model on the tasks. Collective.

        Returns lm_eval's results on rank 0, and an empty dict on all other ranks.
        tokenizer: the recipe's data.text_tokenizer. Raises UserError if a task cannot be answered, for example because
        it needs pictures.
        """
        with raise_on_all_ranks():
            text = load_task_text(tokenizer, model.vocabulary) if model.layout.is_main else None
        team = Team(model)
        return team.lead(lambda: self._evaluate(team, text, model.context)) or {}

    def _evaluate(self, team: Team, text: TaskText | None, context: int) -> Results:
        from lm_eval.evaluator import evaluate

        from moe_dist.harness.language_model import HarnessModel

        assert self.loaded is not None and text is not None
        with keep_random_state():
            results = evaluate(
                HarnessModel(team, text, context),
                self.loaded,
                limit=self.settings.limit,
                bootstrap_iters=BOOTSTRAPS,
                apply_chat_template=self.settings.chat,
                fewshot_as_multiturn=self.settings.chat,
                confirm_run_unsafe_code=self.settings.unsafe_code,
            )
        return dict(results or {})


# -------------------------------------------------------------------------------------------------------------- loading


def _require_lm_eval() -> None:
    """Raise UserError if the package lm_eval is not installed.

    When Python imports a package, it first searches the folder of the running script. There, the script
    launch/lm_eval.py would hide the package lm_eval. If the folder contains a file lm_eval.py, it is therefore removed
    from Python's path.
    """
    scripts = Path(getattr(sys.modules["__main__"], "__file__", None) or "").resolve().parent
    if (scripts / "lm_eval.py").is_file():
        sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != scripts]
    require_extra("lm_eval", "eval", "evaluating tasks")


def load_tasks(settings: TaskSettings) -> TaskDict:
    """Load tasks by their names and files. Returns them in the form that lm_eval's evaluate() takes.

    Raises UserError if a task or file does not exist or cannot be loaded, if a task needs pictures or sound, or if a
    task runs code that the model writes and settings.unsafe_code is False.
    """
    from lm_eval.tasks import TaskManager

    files = [Path(task) for task in settings.tasks if is_file(task)]
    for file in files:
        if not file.is_file():
            raise UserError(f"there is no task file {file}")
    given = {file.resolve().parent for file in files}
    folders = sorted(str(folder) for folder in given if given.isdisjoint(folder.parents))  # subfolders are included
    # Reading the index of lm_eval's own tasks takes seconds.
    manager = TaskManager(include_path=folders, include_defaults=len(files) < len(settings.tasks))
    names = [name for task in settings.tasks for name in _names(task, manager)]
    try:
        loaded = manager.load(list(dict.fromkeys(names)))
    except Exception as error:  # of lm_eval, of the library datasets, or of a task's own code
        lines = str(error).strip().splitlines() or [""]
        tried = ", ".join(settings.tasks)
        raise UserError(f"lm_eval cannot load {tried}: {type(error).__name__}: {lines[0]}") from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) and not settings.unsafe_code:
            raise UserError(
                f"the task {name} runs code that the model writes: only launch/lm_eval.py --unsafe-code does that"
            )
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"the task {name} needs pictures or sound, but tasks can only be answered with text")
        _set_examples(task, settings.fewshot)
    return loaded


def is_file(task: str) -> bool:
    """Return whether a task is given as a file rather than by its name."""
    return task.endswith(".yaml") or "/" in task


def _names(task: str, manager: TaskManager) -> list[str]:
    """Return the names of the lm_eval tasks and groups that match one entry of the setting `tasks`.

    task: the entry, which is a name, a pattern or a file. Raises UserError if nothing matches.
    """
    if is_file(task):
        found = [name for name, entry in manager.task_index.items() if _is_of_file(entry.yaml_path, Path(task))]
        if not found:
            raise UserError(
                f"{task} is not a task file of lm_eval: it must be a .yaml file that names a `task` or a `group`"
            )
        return found
    found = manager.match_tasks([task])
    if not found:
        hint = did_you_mean(task, manager.all_tasks)
        raise UserError(f"lm_eval knows no task '{task}'{hint}: give the name of a task or a YAML file")
    return found


def _is_of_file(path: Path | None, file: Path) -> bool:
    return path is not None and path.resolve() == file.resolve()


def _set_examples(task: Any, fewshot: int | None) -> None:
    """Set a task's number of few-shot examples and the seed that selects them, as lm_eval's command line does.

    If the task's configuration sets the number to 0, it stays 0. Otherwise, it is set to `fewshot`. If `fewshot` is
    None, the task keeps its own number, or gets 0 if it has none.
    """
    given = task.get_config("num_fewshot")
    if given is None or (fewshot is not None and given != 0):
        task.set_config(key="num_fewshot", value=fewshot or 0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


# -------------------------------------------------------------------------------------------------------------- metrics


@dataclass(frozen=True, slots=True)
class TaskMetric:
    """A metric of a task or of a group of tasks."""

    task: str
    name: str  # the metric, followed by /FILTER if a filter other than lm_eval's "none" has processed the answers
    value: float
    interval: Interval | None  # 95 %; None if lm_eval gives no standard error


def task_metrics(results: Mapping[str, Any]) -> list[TaskMetric]:
    """Return the metrics in lm_eval's results, in the order of the results.

    If a metric is the mean of scores that are all 0 or 1, its confidence interval is Wilson's. Otherwise, the interval
    is computed from lm_eval's standard error.
    """
    found = []
    for task, values in results.get("results", {}).items():
        samples = results.get("samples", {}).get(task, ())
        for key, value in values.items():
            metric, _, kept = key.partition(",")
            if not kept or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kept}")
            of_documents = [sample.get(metric) for sample in samples if sample.get("filter", kept) == kept]
            name = metric if kept == "none" else f"{metric}/{kept}"
            found.append(TaskMetric(task, name, float(value), _interval(float(value), error, of_documents)))
    return found


def _interval(value: float, error: Any, of_documents: Sequence[Any]) -> Interval | None:
    if of_documents and all(isinstance(one, int | float) and one in (0, 1) for one in of_documents):
        right, items = int(sum(of_documents)), len(of_documents)
        if math.isclose(value, right / items):
            return wilson(right, items)
    if not isinstance(error, int | float) or not math.isfinite(error):
        return None
    return float(value - Z95 * error), float(value + Z95 * error)


def metric_values(metrics: Iterable[TaskMetric]) -> dict[str, float]:
    """Return metrics as a dict from metric key (metrics/metric_keys.py) to value."""
    values = {}
    for metric in metrics:
        key = f"eval/tasks/{metric.task}/{metric.name}"
        values[key] = metric.value
        if metric.interval is not None:
            values[f"{key}/low"], values[f"{key}/high"] = metric.interval
    return values
