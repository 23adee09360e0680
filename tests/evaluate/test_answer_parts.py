"""Answers in parts: the same as in one go, also after an interruption; parts of another model are not used."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from moe_dist.core.errors import UserError
from moe_dist.evaluate import answer_parts
from moe_dist.evaluate.answer_parts import answer_in_parts
from moe_dist.evaluate.choice_accuracy import Answers, answer
from moe_dist.parallel.layout import Layout, make_layout
from tests.evaluate.test_choice_accuracy import BATCHES, CHOICES, forward
from tests.support.distributed import run_ranks

ABOUT = {"model": "digest"}


@pytest.fixture(autouse=True)
def _one_batch_in_a_part(monkeypatch):
    monkeypatch.setattr(answer_parts, "BATCHES", 1)


class Counting:
    """A model that counts its calls, and is interrupted in call number `last`."""

    def __init__(self, last: int = 99):
        self.calls, self.last = 0, last

    def __call__(self, batch):
        self.calls += 1
        if self.calls > self.last:
            raise KeyboardInterrupt
        return forward(batch)


def assert_equal(one: Answers, other: Answers) -> None:
    for name, value in asdict(one).items():
        assert torch.equal(value, asdict(other)[name]), name


def test_an_interrupted_run_is_continued(tmp_path):
    expected = answer(forward, BATCHES, CHOICES, Layout())
    with pytest.raises(KeyboardInterrupt):
        answer_in_parts(Counting(last=2), BATCHES, CHOICES, Layout(), tmp_path / "parts", ABOUT)
    assert [path.name for path in (tmp_path / "parts").glob("*.safetensors")] == ["000000.safetensors"]
    rest = Counting()
    assert_equal(answer_in_parts(rest, BATCHES, CHOICES, Layout(), tmp_path / "parts", ABOUT), expected)
    assert rest.calls == 2, "the second batch has no items, the third was not finished"


def test_parts_of_another_model_are_removed(tmp_path):
    answer_in_parts(forward, BATCHES, CHOICES, Layout(), tmp_path, {"model": "other"})
    fresh = Counting()
    answer_in_parts(fresh, BATCHES, CHOICES, Layout(), tmp_path, ABOUT)
    assert fresh.calls == 3


def test_a_split_without_items_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no instruction samples"):
        answer_in_parts(forward, BATCHES, {}, Layout(), tmp_path, ABOUT)


def parts_on(rank: int, folder: Path) -> tuple[Answers | None, int]:
    mine = [BATCHES[0], BATCHES[1]] if rank == 0 else [BATCHES[2], BATCHES[1]]
    model, layout = Counting(), make_layout(expert=1, device=torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answer_parts, "BATCHES", 1)
        return answer_in_parts(model, mine, CHOICES, layout, folder, ABOUT), model.calls


def test_two_ranks_write_the_same_answers_and_skip_the_same_parts(tmp_path):
    expected = answer(forward, BATCHES, CHOICES, Layout())
    for calls in (2, 1):
        (found, of_main), (nothing, of_other) = run_ranks(parts_on, 2, tmp_path)
        assert_equal(found, expected)
        assert nothing is None and of_main == of_other == calls
