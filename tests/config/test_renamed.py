"""Keys that have another name now: refused with it in recipes, translated in what earlier versions stored."""

import copy
import re

import pytest
import yaml

from moe_dist.checkpoint.train_state import check_resumable
from moe_dist.config.recipe import load_config, stored_model
from moe_dist.config.renamed import RENAMED, with_new_names
from moe_dist.core.errors import UserError
from moe_dist.metrics.run_folder import RunFolder
from tests.support import ROOT

RECIPE = ROOT / "configs" / "adamoe_quickstart.yaml"


def stored_before(**schedule) -> dict:
    """What a checkpoint of before holds: the old key, and sections of routers, losses and DeepSpeed as written."""
    stored = load_config(RECIPE).model_dump(mode="json")
    rate = stored["schedule"].pop("peak_lr")
    stored["schedule"] |= schedule
    stored["losses"] = {"load_balance": {"weight": [[0, 0.02], [150, 0.0001]], "scope": "global"}}
    params = {"lr": rate, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    stored["deepspeed"] = {"optimizer": {"type": "AdamW", "params": params}, "zero_optimization": {"stage": 1}}
    del stored["model"]["ffn"]["router"]["drop_policy"]
    return stored


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_key_is_refused_with_its_new_name(old, new):
    with pytest.raises(UserError, match=rf"adamoe_quickstart.yaml: key '{old}' is now '{new}'$"):
        load_config(RECIPE, [f"{old}=3"])


def test_the_changelog_has_the_same_table():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert dict(re.findall(r"^\| `([a-z_.]+)` \| `([a-z_.]+)` \|$", text, re.MULTILINE)) == RENAMED


def test_a_checkpoint_of_before_is_resumed():
    check_resumable(stored_before(), load_config(RECIPE))
    longer = load_config(RECIPE, ["schedule.end_lr=2e-3", "train.steps=999"])
    check_resumable(stored_before(end_lr=2e-3), longer)  # a constant rate


def test_a_checkpoint_of_before_is_not_resumed_at_another_rate():
    with pytest.raises(UserError, match=r"schedule\.peak_lr was 0\.002 and is now 0\.3$"):
        check_resumable(stored_before(), load_config(RECIPE, ["schedule.peak_lr=0.3"]))


def test_a_run_folder_of_before_is_evaluated(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored_before()))
    config = RunFolder(tmp_path).evaluation_config(["seed=3"])
    assert (config.schedule.peak_lr, config.seed) == (2e-3, 3)


def test_lora_on_attention_of_before_is_that_of_today():
    stored = load_config(ROOT / "configs" / "llava_mole_quickstart.yaml").model_dump(mode="json")
    lora = stored["model"].pop("lora")
    assert lora.pop("targets") == ["attention.*"]
    stored["model"]["attention_lora"] = lora
    check_resumable(stored, load_config(ROOT / "configs" / "llava_mole_quickstart.yaml"))
    assert stored_model(stored, "test").lora.has("attention.o")
    stored["model"]["attention_lora"] = None
    assert stored_model(stored, "test").lora is None


def test_translation_leaves_todays_keys_and_its_argument_alone():
    for stored in (stored_before(), load_config(RECIPE).model_dump(mode="json")):
        before = copy.deepcopy(stored)
        translated = with_new_names(stored)
        assert stored == before and translated["schedule"]["peak_lr"] == 2e-3
        assert with_new_names(translated) == translated
