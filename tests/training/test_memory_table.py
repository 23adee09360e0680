"""The table of memory in docs/weights.md is what its command prints, for models of the published sizes."""

import re
import sys

import pytest

from moe_dist.config.recipe import load_config
from moe_dist.core.errors import UserError
from moe_dist.training import memory_table
from moe_dist.training.memory_table import recipe_bytes
from tests.convert.test_published_models import PUBLISHED
from tests.support import ROOT

PAGE = (ROOT / "docs" / "weights.md").read_text()
FAST = ("tune_llama_3_1_8b", "tune_mixtral_8x7b")
COMMAND = re.compile(r"configs/(tune_\w+)\.yaml:(\d+)")


def printed(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["memory_table", *arguments])
    memory_table.main()
    return capsys.readouterr().out.splitlines()


def test_the_page_names_the_published_models():
    assert {name: int(size) for name, size in COMMAND.findall(PAGE)} == {
        name: raw["vocab_size"] for name, (raw, _) in PUBLISHED.items()
    }


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in PUBLISHED]
)
def test_the_page_has_what_the_command_prints(name, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = printed(capsys, monkeypatch, f"configs/{name}.yaml:{PUBLISHED[name][0]['vocab_size']}")
    assert len(lines) > 3 and not [line for line in lines if line not in PAGE.splitlines()]


def test_a_single_gpu_holds_everything():
    """With Adam in bf16: 2 + 12 bytes a parameter, 4 of gradients, and the copy of a group's."""
    config = load_config(ROOT / "configs" / "tune_llama_3_1_8b.yaml", ["model.num_layers=1"])
    needed = recipe_bytes(config, 1000, 1)
    numel = needed.parameters // 2
    assert (needed.frozen, needed.masters, needed.moments) == (0, 4 * numel, 8 * numel)
    assert 4 * numel < needed.gradients <= 12 * numel


def test_a_recipe_that_does_not_fit():
    config = load_config(ROOT / "configs" / "tune_mixtral_8x7b.yaml", ["model.num_layers=1"])
    with pytest.raises(UserError, match=r"parallel\.expert=8 does not divide the 12 ranks"):
        recipe_bytes(config, 1000, 12)
    config = load_config(ROOT / "configs" / "tune_mixtral_8x7b.yaml", ["model.num_layers=1", "parallel.expert=3"])
    with pytest.raises(UserError, match=r"parallel\.expert=3 does not divide the model's 8 experts"):
        recipe_bytes(config, 1000, 12)


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("configs/tune_mixtral_8x7b.yaml", "is not a recipe and the size of its vocabulary, a.yaml:32000"),
        ("nowhere.yaml:7", "error: there is no configuration file nowhere.yaml"),
    ],
)
def test_a_wrong_argument_is_one_sentence(argument, sentence, capsys, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        printed(capsys, monkeypatch, argument)
    assert sentence in f"{capsys.readouterr().err} {ended.value}"
