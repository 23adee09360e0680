"""The recipe: strictness, overrides and the sentences a user reads."""

import operator
from pathlib import Path

import pytest

from launch import prepare_data, prepare_model
from moe_dist.config.recipe import load_config, load_stored_config, save_config
from moe_dist.core.errors import UserError
from moe_dist.core.paths import path_setting
from moe_dist.core.strict import parse_yaml, validate
from moe_dist.data.tokenizers.tokenizer_training import TokenizerRecipe
from tests.support.permissions import public_folder, unprivileged

RECIPE = "configs/moma_quickstart.yaml"
TOP_1 = "{type: top_k, num_experts: 4, top_k: 1}"


def test_round_trip(tmp_path):
    config = load_config(RECIPE, ["train.stop_after=3", "schedule.end_lr=1e-4", "data.shards=[a, b]"])
    assert (config.train.stop_after, config.schedule.end_lr, config.data.shards) == (3, 1e-4, ("a", "b"))
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_a_recipe_that_is_not_utf8(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(b"run:\n  dir: caf\xe9\n")
    with pytest.raises(UserError, match=r"recipe.yaml is not UTF-8 text \(byte 15\)"):
        load_config(recipe)


def test_a_recipe_that_may_not_be_read():
    with public_folder() as folder:
        recipe = folder / "recipe.yaml"
        recipe.write_text("seed: 0\n")
        recipe.chmod(0o000)
        with unprivileged(), pytest.raises(UserError, match=r"recipe.yaml cannot be read: Permission denied"):
            load_config(recipe)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.stpes=3", r"unknown key 'train.stpes' \(did you mean 'steps'\?\)"),
        ("model.ffn.hiden_size=3", r"unknown key 'model.ffn.hiden_size' \(did you mean 'hidden_size'\?\)"),
        ("foo=1", "unknown key 'foo'"),
        ("train.steps=many", "key 'train.steps': input should be a valid integer, got 'many'"),
        ("train.steps=0", "key 'train.steps': input should be greater than 0, got 0"),
        ("parallel.expert=1.5", "key 'parallel.expert': .* got 1.5"),
        ("model.num_heads=3", "hidden_size=128 is not a multiple of num_heads=3"),
        ("model.head_size=3", "the rotary embedding needs an even size per head, not 3"),
        ("model.num_query_groups=3", "num_query_groups=3 does not divide num_heads=4"),
        ("model.ffn.slices=3", "key 'model.ffn': hidden_size=256 is not a multiple of 8 times slices=3, which grouped"),
        (
            "model.ffn={type: moe, hidden_size: 64, slices: 2, experts: {type: lora, rank: 4, alpha: 8}, router: "
            + TOP_1
            + "}",
            "key 'model.ffn': slices=2: LoRA experts share one dense FFN and cannot be sliced",
        ),
        ("model.ffn.type=sparse", "key 'model.ffn.type': there is no 'sparse': one of dense, moe"),
        (
            "model.ffn={type: dense, hiden_size: 8}",
            r"unknown key 'model.ffn.hiden_size' \(did you mean 'hidden_size'\?\)",
        ),
        ("model.ffn={hidden_size: 8}", "key 'model.ffn.type' is missing"),
        (
            "model.ffn.router.text.type=[a]",
            r"key 'model.ffn.router.text.type': there is no router '\['a'\]': one of top_k, ",
        ),
        ("model.ffn.router=3", "key 'model.ffn.router': input should be an object, got 3"),
        ("losses.router_z=3", "key 'losses.router_z': input should be an object, got 3"),
        (
            "losses={router_z: {}, load_balanse: {weight: 1}}",
            "key 'losses.router_z.weight' is missing; key 'losses.load_balanse': there is no such loss",
        ),
        (
            "data.shards=3",
            "key 'data.shards': input should be a valid string, got 3; key 'data.shards': input should be a",
        ),
        ("data.shards=[]", "key 'data.shards': the list names no path$"),
        ("data.shards=[a, 3]", "; key 'data.shards.1': input should be a valid string, got 3$"),
        ("needs=[{type: corpus, corpuss: a, out: b}]", r"unknown key 'needs.0.corpuss' \(did you mean 'corpus'\?\)"),
        ("needs=[{type: corpus, out: b}]", "key 'needs.0.corpus' is missing$"),
        ("needs=[{type: corpora}]", r"key 'needs.0.type': there is no 'corpora' \(did you mean 'corpus'\?\)"),
        (
            "deepspeed.optimizer.params.weight_decy=1",
            r"'deepspeed.optimizer.params.weight_decy' \(did you mean 'weight_d",
        ),
        ("train.steps", "override 'train.steps' is not of the form section.key=value"),
        ("seed.x=1", "override 'seed.x=1': 'seed' is a value, not a section"),
        ("run.dir=[", r"override 'run.dir=\[': not valid YAML"),
        ("run.dir=2026", "key 'run.dir': input should be a valid string, got 2026"),
        ("seed=010", "override 'seed=010': 010 is not a decimal number"),
        ("seed=08", "key 'seed': input should be a valid integer, got '08'"),
        ("train.steps=1:30", "override 'train.steps=1:30': 1:30 is not a decimal number"),
        ("train.steps=0x10", "0x10 is not a decimal number"),
        ("train.steps=0b11", "0b11 is not a decimal number"),
        ("train.steps=1_000", "1_000 is not a decimal number"),
        ("schedule.peak_lr=1:30.5", "1:30.5 is not a decimal number"),
        ("train={steps: [5, -010]}", r"override 'train=.*': key 'steps.1': -010 is not a decimal number"),
        ("run.dir=!!binary aGk=", "override 'run.dir=.*': binary is not a kind of value that settings have"),
        ("run=&a [*a]", "override 'run=.*': a value contains itself or is nested too deeply"),
    ],
)
def test_bad_overrides_are_named(override, sentence):
    with pytest.raises(UserError, match=sentence):
        load_config(RECIPE, [override])


@pytest.mark.parametrize(
    ("text", "value"),
    [("10", 10), ("-3", -3), ("0", 0), ("1e-4", 1e-4), ("2E3", 2e3), ("1.", 1.0), (".5", 0.5), ("00.5", 0.5)],
)
def test_decimal_numbers(text, value):
    parsed = parse_yaml(f"key: {text}", "here")["key"]
    assert parsed == value and type(parsed) is type(value)


def test_a_number_of_another_kind_is_named_by_its_key_in_a_file(tmp_path):
    recipe = tmp_path / "a.yaml"
    recipe.write_text("seed: 0\ntrain: {steps: 1:30}\n")
    with pytest.raises(UserError, match=r"a.yaml: key 'train.steps': 1:30 is not a decimal number"):
        load_config(recipe)


def test_a_date_is_a_name(tmp_path):
    config = load_config(RECIPE, ["run.dir=2026-11-28"])
    assert config.run.dir == "2026-11-28"
    save_config(config, tmp_path / "config.yaml")
    assert load_stored_config(tmp_path / "config.yaml") == config


PATHS = ["run.dir", "run.resume", "data.shards", "data.validation_shards", "data.text_tokenizer"]
PATHS += ["data.image_tokenizer", "data.neighbours", "init_from.checkpoint"]


def path_at(config, key):
    return operator.attrgetter(key)(config)


@pytest.mark.parametrize("key", PATHS)
def test_home_and_variables_in_every_path(key, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOWHERE", raising=False)
    for text, path in (
        ("~/a", "/home/me/a"),
        ("$SCRATCH/a", "/scratch/me/a"),
        ("${SCRATCH}_2/$SCRATCH", "/scratch/me_2//scratch/me"),
        ("a~b/$1", "a~b/$1"),
    ):
        config = load_config(RECIPE, [f"{key}={text}"])
        assert path_at(config, key) == path
        save_config(config, tmp_path / "config.yaml")
        assert load_stored_config(tmp_path / "config.yaml") == config
    with pytest.raises(UserError, match=f"key '{key}': the environment variable NOWHERE is not set or empty"):
        load_config(RECIPE, [f"{key}=$NOWHERE/a"])
    with pytest.raises(UserError, match=f"key '{key}': there is no user no-such-user; a folder of this name is ./~no-"):
        load_config(RECIPE, [f"{key}=~no-such-user/a"])


def test_home_and_variables_in_the_arguments_of_other_tools(monkeypatch, tmp_path):
    """A shell expands them only in some positions: sh and zsh leave `out=~/a` as it is."""
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("NOWHERE", raising=False)
    given = {"shards": ["$SCRATCH/a", "~/b"], "out": "${SCRATCH}/c"}
    recipe = validate(TokenizerRecipe, given, "test")
    assert recipe.shards[0] == "/scratch/me/a" and "~" not in recipe.shards[1] and recipe.out == "/scratch/me/c"
    monkeypatch.chdir(tmp_path)
    for tool, name in ((prepare_data, "corpus=text"), (prepare_model, "model=minilm")):
        for out, sentence in (("$NOWHERE/a", "variable NOWHERE is not set"), ("3", "a path is a text, not 3")):
            with pytest.raises(UserError, match=f"key 'out': .*{sentence}"):
                tool.main([name, f"out={out}"])
    assert path_setting("out", "$SCRATCH/a") == Path("/scratch/me/a") and not list(tmp_path.iterdir())


def test_paths_in_lists_braces_pipes_and_needs(monkeypatch):
    monkeypatch.setenv("SCRATCH", "/s")
    shards = "data.shards=[$SCRATCH/a, '${SCRATCH}/{000..010}.tar', 'pipe:cat $UNKNOWN/a']"
    needs = "needs=[{type: corpus, corpus: emoji, out: $SCRATCH/b}]"
    config = load_config(RECIPE, [shards, needs, "init_from=$SCRATCH/c"])
    assert config.data.shards == ("/s/a", "/s/{000..010}.tar", "pipe:cat $UNKNOWN/a"), "a shell expands a pipe"
    assert config.needs[0].out == "/s/b" and config.init_from.checkpoint == "/s/c"
    with pytest.raises(UserError, match=r"key 'data\.shards': the environment variable NOWHERE is not set"):
        load_config(RECIPE, ["data.shards=[a, $NOWHERE/b]"])


def test_missing_file_missing_key_and_doubled_key(tmp_path):
    with pytest.raises(UserError, match=r"there is no configuration file nowhere.yaml"):
        load_config("nowhere.yaml")
    (tmp_path / "a.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match="key 'run' is missing"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("seed: 0\nseed: 1\n")
    with pytest.raises(UserError, match=r"key 'seed' is given twice \(line 2\)"):
        load_config(tmp_path / "b.yaml")
