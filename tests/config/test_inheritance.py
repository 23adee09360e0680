"""`extends`: what is merged, what is replaced, and what is said when a base cannot be read."""

import pytest

from moe_dist.config.inheritance import merge, read_recipe
from moe_dist.config.recipe import load_config
from moe_dist.core.errors import UserError
from tests.support import ROOT


def write(folder, **recipes):
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / "own.yaml"


@pytest.mark.parametrize(
    ("base", "own", "merged"),
    [
        ({"a": 1, "b": 2}, {"b": 3, "c": 4}, {"a": 1, "b": 3, "c": 4}),
        ({"a": {"b": 1, "c": {"d": 2}}}, {"a": {"c": {"e": 3}}}, {"a": {"b": 1, "c": {"d": 2, "e": 3}}}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"a": {"b": 1}}, {"a": None}, {"a": None}),
        ({"a": "x"}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"a": {"type": "x", "b": 1}}, {"a": {"b": 2}}, {"a": {"type": "x", "b": 2}}),
        ({"a": {"type": "x", "b": 1}}, {"a": {"type": "x", "c": 2}}, {"a": {"type": "x", "b": 1, "c": 2}}),
        ({"a": {"type": "x", "b": 1}}, {"a": {"type": "y", "c": 2}}, {"a": {"type": "y", "c": 2}}),
    ],
)
def test_mappings_merge_and_others_replace(base, own, merged):
    assert merge(base, own) == merged


def test_a_chain_of_recipes_relative_to_each_file(tmp_path):
    (tmp_path / "base").mkdir()
    write(tmp_path / "base", first="seed: 1\ntrain: {steps: 2, global_batch_groups: 3}\n")
    own = write(tmp_path, middle="extends: base/first.yaml\ntrain: {steps: 4}\n", own="extends: middle.yaml\nseed: 5\n")
    assert read_recipe(own) == {"seed": 5, "train": {"steps": 4, "global_batch_groups": 3}}


def test_overrides_come_after_all_bases(tmp_path):
    own = write(tmp_path, own=f"extends: {ROOT}/configs/dense_quickstart.yaml\nseed: 5\n")
    config = load_config(own, ["seed=6", "model.ffn.hidden_size=8"])
    assert (config.seed, config.model.ffn.hidden_size, config.model.ffn.type) == (6, 8, "dense")
    with pytest.raises(UserError, match=r"own\.yaml: unknown key 'extends'"):
        load_config(own, ["extends=other.yaml"])


def test_the_path_of_a_base_may_have_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("RECIPES", str(tmp_path / "base"))
    (tmp_path / "base").mkdir()
    write(tmp_path / "base", first="seed: 1\n")
    assert read_recipe(write(tmp_path, own="extends: $RECIPES/first.yaml\n")) == {"seed": 1}
    monkeypatch.delenv("RECIPES")
    with pytest.raises(
        UserError, match=r"own\.yaml: key 'extends': the environment variable RECIPES is not set or empty"
    ):
        read_recipe(tmp_path / "own.yaml")


@pytest.mark.parametrize(
    ("recipes", "sentence"),
    [
        ({"own": "extends: nowhere.yaml\n"}, r"own\.yaml: key 'extends': there is no recipe .*nowhere\.yaml$"),
        (
            {"own": "extends: [a.yaml, b.yaml]\n"},
            r"own\.yaml: key 'extends': give the path of one recipe, not \['a.yaml', ",
        ),
        ({"own": "extends:\n"}, r"own\.yaml: key 'extends': give the path of one recipe, not None$"),
        (
            {"own": "extends: own.yaml\n"},
            r"own\.yaml: key 'extends': recipes extend each other in a circle: .*own\.yaml -> ",
        ),
        (
            {"own": "extends: a.yaml\n", "a": "extends: b.yaml\n", "b": "extends: a.yaml\n"},
            r"b\.yaml: key 'extends': .* in a circle: .*own\.yaml -> .*a\.yaml -> .*b\.yaml -> .*a\.yaml$",
        ),
        ({"own": "extends: a.yaml\n", "a": "- 1\n"}, r"a\.yaml: a recipe must be a mapping of sections$"),
        ({"own": "extends: a.yaml\n", "a": "seed: [\n"}, r"a\.yaml: not valid YAML"),
    ],
)
def test_a_base_that_cannot_be_read_is_one_sentence(tmp_path, recipes, sentence):
    with pytest.raises(UserError, match=sentence):
        load_config(write(tmp_path, **recipes))
