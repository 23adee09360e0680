"""Tasks answered by our model, compared with lm_eval's own model on the export of the same checkpoint."""

import pytest

from moe_dist.harness.task_suite import TaskSettings, task_metrics
from tests.convert.test_export import save_mixtral
from tests.support.distributed import run_ranks
from tests.support.hugging_face_models import save_llama
from tests.support.task_cases import (
    compare_answers,
    import_and_export,
    our_results,
    reference_results,
    save_family,
    write_tasks,
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.mark.parametrize("save", [save_llama, save_mixtral])
@pytest.mark.parametrize("more", [{}, {"fewshot": 3, "limit": 9}, {"chat": True, "fewshot": 1, "limit": 9}])
def test_every_answer_equals_the_reference(save, more, tasks, tmp_path):
    checkpoint, exported = import_and_export(save_family(save, tmp_path / "hf"), tmp_path)
    settings = TaskSettings(tasks=tasks, **more)
    ours, theirs = our_results(-1, checkpoint, settings), reference_results(exported, settings)
    counts = compare_answers(ours, theirs)
    print(counts)
    assert counts["choices"] > 20 and counts["texts"] > 8 and counts["log-likelihoods"] > 80
    print(ours["results"])
    print(task_metrics(ours))


def test_two_ranks_equal_one(tasks, tmp_path):
    checkpoint, _ = import_and_export(save_family(save_mixtral, tmp_path / "hf"), tmp_path)
    settings = TaskSettings(tasks=tasks, limit=7)
    alone = our_results(-1, checkpoint, settings)
    first, second = run_ranks(our_results, 2, checkpoint, settings)
    print(compare_answers(first, alone))
    assert second == {}
