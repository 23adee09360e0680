"""Evaluation on tasks of lm_eval during training (the recipe's eval.tasks)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from moe_dist.config.recipe import Config
from moe_dist.data.tokenizers.vocabulary import Vocabulary
from moe_dist.harness.answering import AnsweringModel
from moe_dist.harness.task_suite import TaskSettings, TaskSuite, metric_values, task_metrics
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.agreement import raise_on_all_ranks
from moe_dist.parallel.layout import Layout


@dataclass(frozen=True, slots=True)
class TaskEvaluation:
    """The tasks of a recipe, and the model in training that answers them."""

    suite: TaskSuite
    model: AnsweringModel
    tokenizer: str  # data.text_tokenizer

    @classmethod
    def open(cls, config: Config, model: Transformer, vocabulary: Vocabulary, layout: Layout) -> TaskEvaluation | None:
        """Load the tasks. Returns None if the recipe has no tasks. Collective.

        Raises UserError if a task cannot be loaded, or if the model's routing cannot be causal.
        """
        if not config.eval.tasks:
            return None
        settings = TaskSettings(tasks=config.eval.tasks, limit=config.eval.task_limit)
        suite = TaskSuite.load(settings, is_main=layout.is_main)
        with raise_on_all_ranks():
            answering = AnsweringModel.of(config, model, vocabulary, layout)
        return cls(suite, answering, config.data.text_tokenizer)

    def evaluate(self, on_step: Callable[[], None]) -> dict[str, float]:
        """Return the metrics of the tasks on rank 0, and an empty dict on other ranks. Collective.

        on_step: called after each forward pass.
        """
        module = self.model.model
        module.eval()
        try:
            results = self.suite.evaluate(replace(self.model, on_step=on_step), self.tokenizer)
        finally:
            module.train()
        return metric_values(task_metrics(results))
