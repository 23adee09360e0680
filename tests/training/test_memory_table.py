"""The table of memory in docs/weights.md is what its command prints, for models of the published sizes."""

import sys

import pytest
import torch

from moe_dist.config.recipe import load_config
from moe_dist.core.errors import UserError
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout
from moe_dist.training import memory_table
from moe_dist.training.memory_table import recipe_bytes
from tests.support import ROOT

PAGE = (ROOT / "docs" / "weights.md").read_text()
SIZES = {"llama_3_1_8b": (128_256, 8.03e9), "mixtral_8x7b": (32_000, 46.7e9)}


def printed(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["memory_table", *arguments])
    memory_table.main()
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name", SIZES)
def test_the_page_has_what_the_command_prints(name, capsys, monkeypatch):
    recipe = f"configs/sizes/{name}.yaml:{SIZES[name][0]}"
    assert recipe in PAGE, "the command is on the page"
    monkeypatch.chdir(ROOT)
    lines = printed(capsys, monkeypatch, recipe)
    assert len(lines) > 3 and not [line for line in lines if line not in PAGE.splitlines()]


@pytest.mark.parametrize("name", SIZES)
def test_the_sizes_are_the_published_ones(name):
    vocab_size, published = SIZES[name]
    config = load_config(ROOT / "configs" / "sizes" / f"{name}.yaml")
    with torch.device("meta"):
        model = Transformer(config.model, vocab_size, Layout(), config.seed)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(published, rel=1e-3)


def test_a_single_gpu_holds_everything():
    """With Adam in bf16: 2 + 12 bytes a parameter, 4 of gradients, and the copy of a group's."""
    config = load_config(ROOT / "configs" / "sizes" / "llama_3_1_8b.yaml", ["model.num_layers=1"])
    needed = recipe_bytes(config, 1000, 1)
    numel = needed.parameters // 2
    assert (needed.frozen, needed.masters, needed.moments) == (0, 4 * numel, 8 * numel)
    assert 4 * numel < needed.gradients <= 8 * numel


def test_a_recipe_that_does_not_fit():
    config = load_config(ROOT / "configs" / "sizes" / "mixtral_8x7b.yaml", ["parallel.expert=8", "model.num_layers=1"])
    with pytest.raises(UserError, match=r"parallel\.expert=8 does not divide the 12 ranks"):
        recipe_bytes(config, 1000, 12)
