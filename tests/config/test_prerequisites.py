"""What a recipe needs first: what it reads is made by what it says, and only what is missing is made."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_dist.config.needs import FileNeed, RunNeed
from moe_dist.config.prerequisites import missing, prerequisite
from moe_dist.config.recipe import load_config
from moe_dist.core.errors import UserError
from moe_dist.training.origin import check_needs
from tests.support import ROOT

RECIPES = sorted((ROOT / "configs").glob("*_quickstart.yaml"))
TOKENIZERS = "python launch/train_tokenizers.py shards=data/emoji out=data/tokenizers vocab_size=1024"
EMOJI = "python launch/prepare_data.py corpus=emoji out=data/emoji"


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """An empty working folder with the recipes."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(name, *overrides):
    return load_config(f"configs/{name}_quickstart.yaml", overrides)


def commands(config):
    return [needed.command for needed in missing(config)]


def made_by(config):
    """Folders that the recipe's needs make, those of earlier stages included."""
    for need in config.needs:
        yield prerequisite(need).folder
        if isinstance(need, RunNeed):
            yield from made_by(load_config(need.recipe))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_all_that_a_recipe_reads_is_made_by_what_it_needs(path, clone):
    config, rules = load_config(path), (ROOT / "Makefile").read_text()
    shards = [config.data.shards] if isinstance(config.data.shards, str) else config.data.shards
    read = [*shards, config.data.text_tokenizer, config.data.image_tokenizer, config.data.neighbours]
    read.append(config.init_from and config.init_from.checkpoint)
    made = (
        {Path("data/smollm2_checkpoint"), Path("data/choices"), Path("runs/roma_experts")}
        if "roma" in path.stem
        else set()
    )
    made |= set(made_by(config))
    for one in filter(None, read):
        assert made & {Path(one), *Path(one).parents}, one
    for need in config.needs:
        assert not isinstance(need, FileNeed) or f"\n{need.path}:" in rules


def test_what_is_complete_is_not_made_again(clone):
    config = recipe("moma")
    assert commands(config) == [EMOJI, TOKENIZERS]
    for done, left in (("data/emoji/corpus.json", [TOKENIZERS]), ("data/tokenizers/vq/quality.json", [])):
        (clone / done).parent.mkdir(parents=True)
        (clone / done).touch()
        assert commands(config) == left


def test_an_earlier_stage_counts_when_its_last_step_is_saved(clone):
    for step, left in ((160, 1), (320, 0)):
        folder = clone / f"runs/moma_quickstart/checkpoints/step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
        assert commands(recipe("moma_causal"))[2:] == ["make train CONFIG=configs/moma_quickstart.yaml ARGS="] * left


def test_settings_of_a_corpus_are_passed_on(clone):
    first = next(missing(load_config("configs/roma_experts.yaml")))
    assert first.command.endswith("corpus=multiple_choice out=data/choices answer=text per_task=600")


@pytest.mark.parametrize(
    ("name", "overrides", "sentence"),
    [
        ("moma", [], f"the recipe needs data/emoji, which is missing: `{EMOJI}` makes it"),
        (
            "moma",
            ["data.shards=configs"],
            f"the recipe needs data/tokenizers, which is missing: `{TOKENIZERS}` makes it",
        ),
        (
            "llava_mole",
            ["data.shards=configs", "data.text_tokenizer=configs", "data.image_tokenizer=configs"],
            "the recipe needs runs/dense_quickstart, which is missing: "
            "`make train CONFIG=configs/dense_quickstart.yaml ARGS=` makes it",
        ),
    ],
)
def test_training_says_which_command_makes_what_is_missing(name, overrides, sentence, clone):
    with pytest.raises(UserError) as caught:
        check_needs(recipe(name, *overrides), resumes=False)
    assert str(caught.value) == sentence


def test_training_does_not_miss_what_overrides_have_replaced(clone):
    own = ["data.shards=configs", "data.text_tokenizer=configs", "data.image_tokenizer=null"]
    check_needs(recipe("moma", *own), resumes=False)
    check_needs(recipe("llava_mole", *own, "init_from=null"), resumes=False)
    check_needs(recipe("llava_mole", *own), resumes=True)
    own = ["data.shards=elsewhere", "data.text_tokenizer=other", "data.image_tokenizer=null"]
    check_needs(recipe("moma", *own), resumes=False)


def test_make_stops_with_the_sentence_of_a_faulty_recipe(tmp_path):
    (tmp_path / "own.yaml").write_text(f"extends: {ROOT}/configs/moma_quickstart.yaml\nsed: 1\n")
    command = [sys.executable, "-m", "moe_dist.config.prerequisites", str(tmp_path / "own.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path}/own.yaml: unknown key 'sed' (did you mean 'seed'?)\n"
