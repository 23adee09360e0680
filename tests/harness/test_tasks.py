"""Tasks answered by our model, compared with lm_eval's own model on the export of the same checkpoint."""

from pathlib import Path

import pytest
import torch

from moe_dist.convert.packaged import prepare_smollm2
from moe_dist.core.errors import UserError
from moe_dist.harness.task_suite import TaskSettings, TaskSuite, task_metrics
from moe_dist.parallel.layout import Layout, make_layout
from tests.convert.test_export import save_mixtral
from tests.support.distributed import run_ranks
from tests.support.hugging_face_models import save_llama
from tests.support.long import LONG
from tests.support.task_cases import (
    answering_model,
    compare_answers,
    import_and_export,
    our_results,
    reference_results,
    save_family,
    write_tasks,
)

PLAIN = {"limit": 24}
EXAMPLES_IN_A_CHAT = {"fewshot": 2, "chat": True, "limit": 12}  # longer than the context


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """The checkpoint of a random Mixtral, and its export."""
    folder = tmp_path_factory.mktemp("mixtral")
    return import_and_export(save_family(save_mixtral, folder / "hf"), folder)


@pytest.mark.parametrize(("save", "more"), [(save_llama, EXAMPLES_IN_A_CHAT), (save_mixtral, PLAIN)])
def test_every_answer_equals_the_reference(save, more, tasks, tmp_path):
    checkpoint, exported = import_and_export(save_family(save, tmp_path / "hf"), tmp_path)
    settings = TaskSettings(tasks=tasks, **more)
    ours, theirs = our_results(-1, checkpoint, settings), reference_results(exported, settings)
    counts = compare_answers(ours, theirs)
    print(counts)
    assert counts["log-likelihoods"] > 150 and counts["texts"] >= 12 and counts["choices"] > 30
    assert counts["close choices"] < 3, "the reference decides nearly all by more than rounding"


def test_a_swap_of_two_experts_is_found(mixtral, tasks):
    settings = TaskSettings(tasks=tasks[:1], limit=2)
    model = answering_model(mixtral[0], Layout())
    with torch.no_grad():
        weight = next(p for name, p in model.model.named_parameters() if "experts" in name and p.dim() == 3)
        weight[[0, 1]] = weight[[1, 0]]
    ours = TaskSuite.load(settings, is_main=True).evaluate(model, str(mixtral[0] / "tokenizer"))
    with pytest.raises(AssertionError, match="instead of"):
        compare_answers(ours, reference_results(mixtral[1], settings))


def test_two_ranks_with_half_of_the_experts_equal_one(mixtral, tasks):
    """Five documents: the second rank has fewer requests than the first, and none in the last rounds."""
    settings = TaskSettings(tasks=tasks, limit=5)
    first, second = run_ranks(our_results, 2, mixtral[0], settings)
    assert compare_answers(first, our_results(-1, mixtral[0], settings))["texts"] == 5
    assert second == {}


def test_metrics_have_intervals(mixtral, tasks):
    results = our_results(-1, mixtral[0], TaskSettings(tasks=[tasks[0], tasks[2]]))
    metrics = {(m.task, m.name): m for m in task_metrics(results)}
    accuracy = metrics["letter_emoji", "acc"]
    right = sum(sample["acc"] for sample in results["samples"]["letter_emoji"])
    assert accuracy.value == right / len(results["samples"]["letter_emoji"])
    assert 0 <= accuracy.interval[0] < accuracy.value < accuracy.interval[1] <= 1
    assert metrics["letter", "acc"].value == accuracy.value, "the group has one task"
    assert metrics["rolling", "bits_per_byte"].value > 0


def refused(rank, tasks):
    layout = Layout() if rank < 0 else make_layout(expert=1, device=torch.device("cpu"))
    try:
        TaskSuite.load(TaskSettings(tasks=tasks), is_main=layout.is_main)
    except UserError as error:
        return str(error)
    return None


def test_tasks_that_do_not_exist(tasks, tmp_path):
    assert refused(-1, ["helaswag"]) == (
        "lm_eval knows no task 'helaswag' (did you mean 'hellaswag'?): give the name of a task or a YAML file"
    )
    assert refused(-1, [tasks[0], str(tmp_path / "no.yaml")]) == f"there is no task file {tmp_path / 'no.yaml'}"
    (tmp_path / "empty.yaml").write_text("a: 1\n")
    assert "is not a task file of lm_eval" in refused(-1, [str(tmp_path / "empty.yaml")])
    (tmp_path / "lost.yaml").write_text(
        "task: lost\ndataset_path: json\ndataset_kwargs: {data_files: {test: /nowhere.jsonl}}\ntest_split: test\n"
    )
    assert refused(-1, [str(tmp_path / "lost.yaml")]).startswith(f"lm_eval cannot load {tmp_path / 'lost.yaml'}: ")


def test_every_rank_has_the_sentence(tmp_path):
    first, second = run_ranks(refused, 2, [str(tmp_path / "no.yaml")])
    assert first == f"there is no task file {tmp_path / 'no.yaml'}" and second == f"{first} (rank 0)"


def refuse_settings(rank, checkpoint, tasks):
    """Have rank 0 refuse a request while the other ranks follow."""
    layout = make_layout(expert=2, device=torch.device("cpu"))
    suite = TaskSuite.load(TaskSettings(tasks=tasks, limit=1), is_main=layout.is_main)
    try:
        suite.evaluate(answering_model(checkpoint, layout), str(checkpoint / "tokenizer"))
    except UserError as error:
        return str(error)
    return None


def test_settings_of_generation_that_are_not_supported(mixtral, tasks, tmp_path):
    text = Path(next(task for task in tasks if "continued" in task)).read_text()
    beams = tmp_path / "beams.yaml"
    beams.write_text(text.replace("task: continued", "task: beams").replace("until:", "num_beams: 3\n  until:"))
    first, second = run_ranks(refuse_settings, 2, mixtral[0], [str(beams)])
    assert "generation_kwargs of a task" in first and "num_beams" in first and second == f"{first} (rank 0)"


@pytest.mark.skipif(not LONG, reason="a real model, minutes of processor time: make test-long runs it")
def test_smollm2_answers_as_in_transformers(tasks, tmp_path):
    prepare_smollm2(tmp_path / "smollm2")
    checkpoint, exported = import_and_export(tmp_path / "smollm2", tmp_path)
    settings = TaskSettings(tasks=tasks, limit=20)
    ours, theirs = our_results(-1, checkpoint, settings), reference_results(exported, settings)
    print(compare_answers(ours, theirs), [m for m in task_metrics(ours) if m.name == "acc"])
