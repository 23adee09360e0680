"""Task files of lm_eval: what they hold, and shards that are refused."""

import json

import pytest
import yaml

from moe_dist.core.errors import UserError
from moe_dist.data.shards.tars import Sample, write_shards
from moe_dist.data.tasks.task_files import TaskFilesRecipe, write_task_files
from moe_dist.harness.task_suite import TaskSettings, load_tasks
from tests.support.task_cases import write_choice_shards


def write(shards, out, **more):
    return write_task_files(TaskFilesRecipe(shards=str(shards), out=str(out), **more))


@pytest.mark.parametrize(("answer", "first"), [("letter", " A"), ("text", None)])
def test_the_items_of_the_split_are_asked(answer, first, tmp_path):
    shards = write_choice_shards(tmp_path / "shards", answer)
    counts = write(shards, tmp_path / "words")
    loaded = load_tasks(TaskSettings(tasks=[str(tmp_path / "words" / "words.yaml")]))
    assert list(loaded["tasks"]) == list(counts) == ["words_emoji"] and list(loaded["groups"]) == ["words"]
    task = loaded["tasks"]["words_emoji"]
    items = [json.loads(line) for line in (tmp_path / "words" / "emoji.jsonl").read_text().splitlines()]
    assert len(items) == counts["words_emoji"] == len(task.eval_docs) > 5
    for item, doc in zip(items, task.eval_docs, strict=True):
        assert task.doc_to_text(doc) == item["prompt"] and task.doc_to_choice(doc) == item["options"]
        assert first in (None, item["options"][0]) and item["prompt"].endswith("Answer:")
        assert all(option.startswith(" ") for option in item["options"]) and len(item["options"]) == 4
    examples = {
        json.loads(line)["key"] for line in (tmp_path / "words" / "emoji.examples.jsonl").read_text().splitlines()
    }
    assert examples and not examples & {item["key"] for item in items}, "examples are of the training split"
    assert yaml.safe_load((tmp_path / "words" / "emoji.yaml").read_text())["target_delimiter"] == ""


def test_what_is_refused(emoji_shards, tmp_path):
    with pytest.raises(UserError, match="is not a multiple-choice item without a picture"):
        write(emoji_shards, tmp_path / "words")
    with pytest.raises(UserError, match="the name of the folder may have letters"):
        write(emoji_shards, tmp_path / "my words")
    (tmp_path / "old").mkdir()
    with pytest.raises(UserError, match="exists already"):
        write(emoji_shards, tmp_path / "old")
    meta = {"prompt": "What?", "answer": " a", "domain": "a/b", "options": ["a", "b"], "correct": 0}
    write_shards([Sample(split, split, None, None, meta) for split in ("train", "validation")], tmp_path / "odd")
    with pytest.raises(UserError, match="the domain 'a/b' may have letters"):
        write(tmp_path / "odd", tmp_path / "words")
    assert not (tmp_path / "words").exists()
