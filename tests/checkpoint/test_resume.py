"""Choice of the checkpoint to resume from, recipes that may resume, and removal of old checkpoints."""

import json
from contextlib import nullcontext
from functools import reduce

import pytest

from moe_dist.checkpoint.checkpoint import checkpoint_path, newest_complete, prune, resolve_resume
from moe_dist.checkpoint.manifest import set_aside_later, write_manifest
from moe_dist.checkpoint.train_state import MAY_CHANGE, TrainState, check_resumable, merge_states
from moe_dist.config.recipe import load_config
from moe_dist.core.errors import UserError
from moe_dist.core.files import write_json
from tests.support import ROOT

RECIPE = ROOT / "configs" / "moma_quickstart.yaml"


def recipe(*overrides):
    return load_config(RECIPE, overrides)


def put(run_dir, step, *, complete=True):
    """Make a checkpoint folder with one file, just enough to count as complete."""
    folder = checkpoint_path(run_dir, step)
    folder.mkdir(parents=True)
    write_manifest(folder, [write_json(folder / "state.json", {"step": step})])
    if not complete:
        (folder / "state.json").unlink()
    return folder


def test_the_newest_checkpoint(tmp_path):
    assert newest_complete(tmp_path) is None
    for step in (9, 10):
        newest = put(tmp_path, step)
    put(tmp_path, 11).rename(tmp_path / "checkpoints" / "step_00000011.tmp")
    put(tmp_path, 12).rename(tmp_path / "checkpoints" / "step_00000012.aside")
    assert newest_complete(tmp_path) == newest
    for step in (99_999_999, 100_000_000):  # one digit more comes later all the same
        assert newest_complete(put(tmp_path, step).parents[1]) == checkpoint_path(tmp_path, step)


def test_a_damaged_newest_one_is_not_passed_over(tmp_path):
    put(tmp_path, 1)
    damaged = put(tmp_path, 2, complete=False)
    with pytest.raises(UserError) as caught:
        resolve_resume(recipe(f"run.dir={tmp_path}"))
    remedy = f"restore it, or move {damaged} away to continue from the checkpoint before it"
    assert str(caught.value) == f"{damaged / 'state.json'} is missing; {remedy}"
    damaged.rename(tmp_path / "elsewhere")
    assert newest_complete(tmp_path) == checkpoint_path(tmp_path, 1)
    damaged.mkdir()
    with pytest.raises(UserError, match=r"step_00000002/manifest\.json cannot be read; restore it, or move"):
        newest_complete(tmp_path)


def test_prune_keeps_the_newest_and_removes_leftovers(tmp_path):
    folders = [put(tmp_path, step) for step in (1, 2, 3, 4)]
    damaged = put(tmp_path, 5, complete=False)
    (tmp_path / "checkpoints" / "step_00000006.tmp").mkdir()
    (tmp_path / "checkpoints" / "notes").mkdir()
    prune(tmp_path, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == sorted(
        ["notes", damaged.name, *(folder.name for folder in folders[2:])]
    )


def test_checkpoints_of_later_steps_are_set_aside(tmp_path):
    """Otherwise a run that starts anew would prune its own checkpoints and resume from the other run's."""
    put(tmp_path, 3).rename(tmp_path / "checkpoints" / "step_00000003.aside")
    for step in (1, 2, 3):
        put(tmp_path, step)
    assert [path.name for path in set_aside_later(tmp_path, 1)] == ["step_00000002", "step_00000003"]
    assert newest_complete(tmp_path) == checkpoint_path(tmp_path, 1)
    prune(tmp_path, keep=1)
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {"step_00000001", "step_00000002.aside", "step_00000003.aside"}


def test_prune_keeps_every_mth(tmp_path):
    """The newest two and those of steps 10, 20 and 30 stay. A step saved at the end of a stage is not a multiple."""
    for step in (5, 10, 12, 20, 25, 30, 35):
        put(tmp_path, step)
        prune(tmp_path, keep=2, keep_every=10)
    left = [path.name for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert left == [f"step_{step:08d}" for step in (10, 20, 30, 35)]
    assert newest_complete(tmp_path) == checkpoint_path(tmp_path, 35)


def test_resolve_resume(tmp_path):
    def resolve(value):
        return resolve_resume(recipe(f"run.dir={tmp_path}", f"run.resume={value}"))

    assert resolve("auto") is None
    first, second = put(tmp_path, 1), put(tmp_path, 2)
    assert resolve("auto") == second
    assert resolve("none") is None
    assert resolve(first) == first
    (second / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"run\.resume=.*step_00000002 is neither a .*state\.json has 2 bytes"):
        resolve(second)
    with pytest.raises(UserError, match=r"run\.resume=.*nowhere is neither a complete checkpoint nor a run"):
        resolve(tmp_path / "nowhere")


def test_resume_from_the_folder_of_another_run(tmp_path):
    """Its newest complete checkpoint is taken, as init_from takes it; run.dir's own checkpoints do not count."""
    put(tmp_path / "earlier", 1)
    newest, _ = put(tmp_path / "earlier", 2), put(tmp_path / "own", 3)
    settings = [f"run.dir={tmp_path / 'own'}", f"run.resume={tmp_path / 'earlier'}"]
    assert resolve_resume(recipe(*settings)) == newest
    (newest / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"step_00000002/state\.json has 2 bytes.*; restore it, or move"):
        resolve_resume(recipe(*settings))


@pytest.mark.parametrize(
    "override",
    [
        "run.dir=elsewhere",
        "train.stop_after=7",
        "train.micro_batch_groups=1",
        "parallel.expert=1",
        "eval.every=3",
        "checkpoint.keep=9",
        "checkpoint.keep_every=7",
        "checkpoint.asynchronous=false",
        "telemetry.tensorboard=false",
        "model.recompute=true",
        "deepspeed.zero_optimization.stage=3",
    ],
)
def test_keys_that_may_change(override):
    check_resumable(recipe().model_dump(mode="json"), recipe(override))


@pytest.mark.parametrize(
    "override",
    [
        "seed=77",
        "model.num_layers=77",
        "model.ffn.router.text.num_experts=77",
        "data.lanes=77",
        "data.shards=other",
        "train.steps=7777",
        "train.global_batch_groups=77",
        "schedule.end_lr=0.7",
        "schedule.peak_lr=0.7",
        'trainable=["*.router.*"]',
    ],
)
def test_keys_that_may_not(override):
    key, _, value = override.partition("=")
    old = recipe().model_dump(mode="json")
    before = reduce(lambda section, part: section[part], key.split("."), old)
    after = json.dumps(value) if value == "other" else value
    with pytest.raises(UserError, match="cannot resume this checkpoint with another recipe") as caught:
        check_resumable(old, recipe(override))
    assert str(caught.value).endswith(f": {key} was {json.dumps(before)} and is now {after}")


@pytest.mark.parametrize(("old", "new", "may"), [(5, 6, True), (6, 5, False)])
def test_a_run_at_a_constant_rate_may_become_longer(old, new, may):
    constant = ["schedule.end_lr=0.1", "schedule.peak_lr=0.1"]
    before = recipe(f"train.steps={old}", *constant).model_dump(mode="json")
    with nullcontext() if may else pytest.raises(UserError, match=f"train.steps was {old} and is now {new}$"):
        check_resumable(before, recipe(f"train.steps={new}", *constant))


def test_a_key_that_was_not_set():
    with pytest.raises(UserError, match=r"losses\.router_z\.weight was not set and is now \[\[0, 0\.1\]\]"):
        check_resumable(recipe().model_dump(mode="json"), recipe("losses.router_z.weight=0.1"))


def test_many_changes_are_counted():
    overrides = ["seed=77", "data.lanes=77", "train.steps=7777", "model.num_layers=77", "schedule.end_lr=0.77"]
    with pytest.raises(UserError, match=r"and 2 more$"):
        check_resumable(recipe().model_dump(mode="json"), recipe(*overrides))


def test_the_table_names_real_keys():
    dump = recipe().model_dump(mode="json")
    for path in MAY_CHANGE:
        section = dump
        for key in path.split("."):
            assert key in section, path
            section = section[key]


def test_states_are_united_key_by_key():
    states = [{"step": 3, "loader": {"lanes": {lane: [lane, {}]}, "epoch": 0}} for lane in (0, 1)]
    assert merge_states(states) == {"step": 3, "loader": {"lanes": {"0": [0, {}], "1": [1, {}]}, "epoch": 0}}
    with pytest.raises(RuntimeError, match=r"disagree on 'loader\.epoch': 0 and 1"):
        merge_states([states[0], {"step": 3, "loader": {"epoch": 1}}])
    with pytest.raises(RuntimeError, match="disagree on 'loader'"):
        merge_states([{"loader": 1}, {"loader": {}}])


def test_train_state_survives_json():
    state = TrainState(step=4, tokens=99, loader={"lanes": {}}, config={"seed": 0}, vocabulary="abc")
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state
