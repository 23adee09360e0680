"""A stage that starts from another stage's checkpoint accounts for every tensor, in any two layouts."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from moe_dist.checkpoint.init_from import match
from moe_dist.checkpoint.manifest import resolve_init
from moe_dist.checkpoint.stage_account import Account, Form
from moe_dist.checkpoint.stored_weights import read_tensors, write_tensors
from moe_dist.config.recipe import InitFrom, load_config, save_config
from moe_dist.core.errors import UserError
from moe_dist.core.strict import validate
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout
from moe_dist.training.trainable import freeze_others
from tests.checkpoint.test_checkpoint import SMALL, read
from tests.support import ROOT
from tests.support.checkpoint_jobs import Job, assert_same, attempt, run
from tests.support.distributed import run_ranks
from tests.support.toy_model import TOP_K

RECIPE = ROOT / "configs" / "moma_quickstart.yaml"

# --- the matching of names


def forms(**shapes) -> dict[str, Form]:
    """Make forms: a_b=(2, 3) is a parameter 'a.b' of this shape, a_b=[2, 3] two stacked experts of shape (3,)."""
    return {
        name.replace("_", "."): Form(tuple(shape[1:]), tuple(range(shape[0])), True)
        if isinstance(shape, list)
        else Form(shape, None, True)
        for name, shape in shapes.items()
    }


STORED = forms(embedding=(9, 4), layers_0_ffn_up=(4, 8), layers_1_ffn_up=(4, 8), layers_0_head=(4,), experts=[3, 4, 5])
MODEL = forms(
    embedding=(9, 4),
    layers_0_ffn_base_up=(4, 8),
    layers_1_ffn_base_up=(4, 8),
    layers_0_router=(2, 4),
    experts=[3, 4, 5],
)
RENAME = {"layers.*.ffn.*": "layers.*.ffn.base.*"}
GOOD = InitFrom(checkpoint="x", rename=RENAME, new=("*.router",), left_out=("*.head",))


def test_every_tensor_has_its_fate():
    account = match(GOOD, STORED, MODEL).to_json()
    assert [(e["name"], e["from"], e["parameters"]) for e in account["loaded"]["entries"]] == [
        ("embedding", "embedding", 36),
        ("layers.0.ffn.base.up", "layers.0.ffn.up", 32),
        ("layers.1.ffn.base.up", "layers.1.ffn.up", 32),
        ("experts", "experts", 60),
    ]
    assert account["new"]["entries"] == [{"name": "layers.0.router", "shape": [2, 4], "parameters": 8}]
    assert account["left_out"]["entries"] == [{"name": "layers.0.head", "shape": [4], "parameters": 4}]
    totals = [(account[fate]["tensors"], account[fate]["parameters"]) for fate in ("loaded", "new", "left_out")]
    assert totals == [(4, 160), (1, 8), (1, 4)]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"new": ()}, "the checkpoint has nothing for the model's 'layers.0.router': rename something to"),
        ({"left_out": ()}, "the model has no place for the checkpoint's 'layers.0.head': rename it, or add"),
        ({"rename": {}}, "the model has no place for the checkpoint's 'layers.0.ffn.up' (and 1 more)"),
        ({"new": ("layers.0.ruoter",)}, "'layers.0.ruoter' matches no parameter of the model (the closest is 'layer"),
        ({"left_out": ("*.haed",)}, "init_from.left_out: '*.haed' matches no parameter of the checkpoint"),
        ({"rename": {"lyers.*": "x.*"}}, "init_from.rename: 'lyers.*' matches no parameter of the checkpoint"),
        ({"rename": RENAME | {"*.head": "*.tail"}}, "init_from.rename: '*.head' matches no parameter of the"),
        (
            {"rename": RENAME | {"*.1.ffn.up": "*.u"}},
            "the checkpoint's 'layers.1.ffn.up' matches both 'layers.*.ffn.*' and '*.1.ffn.up'",
        ),
        (
            {"rename": {"layers.0.ffn.up": "u", "layers.1.ffn.up": "u"}},
            "the checkpoint's 'layers.0.ffn.up' and 'layers.1.ffn.up' would both become 'u'",
        ),
        (
            {"rename": RENAME | {"embedding": "experts"}},
            "the checkpoint's 'embedding' and 'experts' would both become 'experts'",
        ),
        (
            {"rename": {"layers.*.ffn.up": "layers.*.ffn.up2"}},
            "no place for the checkpoint's 'layers.0.ffn.up' (renamed 'layers.0.ffn.up2') (and 1 more)",
        ),
        (
            {"new": ("*.router", "emb*")},
            "init_from.new counts the model's 'embedding', but the checkpoint would fill it with 'embedding'",
        ),
        (
            {"rename": {"*.0.ffn.up": "*.1.ffn.base.up", "*.1.ffn.up": "*.0.router"}, "new": ("*.0.ffn*",)},
            "the checkpoint's 'layers.1.ffn.up' is [4, 8], the model's 'layers.0.router' is [2, 4]",
        ),
    ],
)
def test_a_tensor_without_a_fate_is_named(changes, sentence):
    with pytest.raises(UserError) as caught:
        match(GOOD.model_copy(update=changes), STORED, MODEL)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_experts_must_be_as_many():
    sentence = r"'experts' is 3 experts of \[4, 5\], the model's 'experts' is 4 experts of \[4, 5\]"
    with pytest.raises(UserError, match=sentence):
        match(GOOD, STORED, MODEL | forms(experts=[4, 4, 5]))
    with pytest.raises(UserError, match=r"'experts' is 3 experts of \[4, 5\], the model's 'experts' is \[3, 4, 5\]"):
        match(GOOD, STORED, MODEL | forms(experts=(3, 4, 5)))
    counts = {"embedding": Form((9, 4), None, is_float=False)}
    with pytest.raises(UserError, match=r"'embedding' is \[9, 4\], the model's 'embedding' is \[9, 4\] \(integers\)"):
        match(GOOD, STORED, MODEL | counts)


def numel(form: Form) -> int:
    return math.prod(form.shape) * (1 if form.experts is None else len(form.experts))


@pytest.mark.parametrize("seed", range(50))
def test_the_account_sums_to_all_parameters_of_both_sides(seed):
    draw = random.Random(seed)
    shapes = [draw.choice([(3, 2), (7,), [2, 5], (1, 1, 4)]) for _ in range(30)]
    names = [f"{'abc'[i % 3]}_{i}" for i in range(30)]
    fates = draw.choices(["loaded", "renamed", "new", "left_out"], k=30)
    fates[:4] = ["loaded", "renamed", "new", "left_out"]
    stored = forms(**{n: s for n, s, fate in zip(names, shapes, fates) if fate != "new"})
    model = forms(
        **{
            f"deep_{n}_end" if fate == "renamed" else n: s
            for n, s, fate in zip(names, shapes, fates)
            if fate != "left_out"
        }
    )
    of_fate = {fate: [n.replace("_", ".") for n, f in zip(names, fates) if f == fate] for fate in set(fates)}
    settings = InitFrom(
        checkpoint="x",
        rename={n: f"deep.{n}.end" for n in of_fate["renamed"]},
        new=tuple(of_fate["new"]),
        left_out=tuple(of_fate["left_out"]),
    )
    account = match(settings, stored, model).to_json()
    loaded, new, left_out = (account[fate]["parameters"] for fate in ("loaded", "new", "left_out"))
    assert loaded + new == sum(map(numel, model.values()))
    assert loaded + left_out == sum(map(numel, stored.values()))
    dropped = draw.choice(["new", "left_out"])  # whatever pattern is dropped, its tensor is missed
    kept = tuple(of_fate[dropped][:-1])
    with pytest.raises(UserError, match=f"'{of_fate[dropped][-1]}'"):
        match(settings.model_copy(update={dropped: kept}), stored, model)


def forms_of(model: nn.Module) -> dict[str, Form]:
    found = {}
    for name, parameter in model.named_parameters():
        experts = getattr(parameter, "expert_ids", None)
        found[name] = Form(tuple(parameter.shape[experts is not None :]), experts, True)
    return found


def test_the_documented_example():
    """The stage goes from the dense quickstart's model to LoRA experts over its feed-forward parts."""
    text = (RECIPE.parents[1] / "docs" / "stages.md").read_text()
    example = yaml.safe_load(re.search(r"```yaml\n(init_from:.*?)```", text, re.DOTALL).group(1))
    dense = load_config(RECIPE.with_name("dense_quickstart.yaml"))
    experts = "{type: moe, hidden_size: 256, experts: {type: lora, rank: 4, alpha: 8.0}, router: {type: top_k, "
    lora = load_config(RECIPE.with_name("dense_quickstart.yaml"), [f"model.ffn={experts}num_experts: 4, top_k: 1}}}}"])
    with torch.device("meta"):
        before, after = (Transformer(config.model, 96, Layout(), seed=0) for config in (dense, lora))
    account = match(validate(InitFrom, example["init_from"], "docs"), forms_of(before), forms_of(after))
    assert sorted(account.loaded.values()) == sorted(name for name, _ in before.named_parameters())
    freeze_others(after, example["trainable"])
    assert account.new == [name for name, parameter in after.named_parameters() if parameter.requires_grad]


def test_what_a_star_stands_for_is_carried_over_in_order():
    stored = forms(a_1_x_2_y=(1,), b_3=(2,))
    model = forms(q_1_r_2_y=(1,), b_3=(2,))
    account = match(InitFrom(checkpoint="x", rename={"a.*.x.*": "q.*.r.*"}), stored, model)
    assert account.loaded == {"q.1.r.2.y": "a.1.x.2.y", "b.3": "b.3"}


# --- the recipe


def test_the_recipe(tmp_path):
    plain = load_config(RECIPE, ["init_from=runs/a"])
    assert plain.init_from == InitFrom(checkpoint="runs/a")
    full = load_config(RECIPE, ['init_from={checkpoint: runs/a, rename: {"a.*": "b.*"}, new: ["c*"], left_out: [d]}'])
    assert full.init_from == InitFrom(checkpoint="runs/a", rename={"a.*": "b.*"}, new=("c*",), left_out=("d",))
    save_config(full, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == full


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("{checkpoint: a, rename: {'a.*': 'b'}}", r"key 'init_from': rename 'a\.\*: b' must have the same number of"),
        ("{chekpoint: a}", r"unknown key 'init_from.chekpoint' \(did you mean 'checkpoint'\?\)"),
        ("{new: ['*']}", "key 'init_from.checkpoint' is missing"),
        ("{checkpoint: a, new: router}", "key 'init_from.new': "),
    ],
)
def test_a_wrong_recipe(value, sentence):
    with pytest.raises(UserError, match=sentence):
        load_config(RECIPE, [f"init_from={value}"])


def test_a_step_folder_or_a_run_folder(saved, tmp_path):
    def resolve(path):
        return resolve_init(load_config(RECIPE, [f"init_from={path}"]))

    step = Path(saved[0].save)
    assert resolve(step) == resolve(step.parent.parent) == InitFrom(checkpoint=str(step))
    assert resolve_init(load_config(RECIPE)) is None
    for wrong in (tmp_path, tmp_path / "nowhere", step.parent):
        with pytest.raises(UserError, match=f"init_from.checkpoint={wrong} is neither a complete checkpoint nor a run"):
            resolve(wrong)


# --- real engines

KINDS = ("master", "frozen", "buffer")
WRAP = {"*": "inner.*"}


def stage(job: Job, settings: dict | None = None, **changes) -> Job:
    """Make a new stage that starts from a job's checkpoint."""
    init = InitFrom(**{"checkpoint": job.save} | (settings or {}))
    return replace(Job(init=init), **{"stop": 2} | changes)


def parameters(found: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """Select masters, working parameters and the buffer from a run's state, by name under a prefix."""
    result = {}
    for key, tensor in found.items():
        kind, _, name = key.rpartition(" ") if key == "calls" else key.partition(" ")
        if kind in ("master", "working", ""):
            result[f"{kind} {prefix}{name}".strip()] = tensor
    return result


@pytest.mark.slow
def test_any_layout_starts_from_any(saved, tmp_path):
    """All names are changed, experts keep their global ids, and no optimizer state is loaded."""
    second = Job(expert=1, stage=3, stop=2, save=str(tmp_path / "step_00000002"), save_at=2)
    for job, source in (saved, (second, run(second))):
        first = None
        for world, expert, zero in SMALL:
            new = run(stage(job, {"rename": WRAP}, world=world, expert=expert, stage=zero, wrapped=True), follow=first)
            assert_same(new.at_save, parameters(source.at_save, "inner."))
            first = first or new
            assert new.losses == pytest.approx(first.losses, rel=1e-5)
            assert new.norms == pytest.approx(first.norms, rel=1e-4)


def test_a_folder_of_converted_weights(saved, tmp_path):
    """The checkpoint is as launch/convert.py writes it: one file, without optimizer state or run state."""
    job, source = saved
    write_tensors(tmp_path / "converted", read_tensors(job.save), {"source": "elsewhere"})
    new = run(stage(replace(job, save=str(tmp_path / "converted")), {"new": ("calls",)}, stage=3, stop=0))
    loaded, stored = parameters(new.at_save), parameters(source.at_save)
    assert_same({**loaded, "calls": stored["calls"]}, stored)


@pytest.mark.parametrize("zero", [1, 3])
def test_the_optimizer_starts_afresh(zero, saved):
    """Without decay AdamW's first step is lr * sign(gradient). With the checkpoint's moments it would differ."""
    outcome = run(stage(saved[0], stage=zero, stop=1, eps=1e-8))
    step = outcome.at_end["master output.bias"] - outcome.at_save["master output.bias"]
    torch.testing.assert_close(step.abs(), torch.full_like(step, 0.01), rtol=1e-3, atol=0)


def test_new_parameters_keep_their_own_values(saved):
    job, source = saved
    settings = {"new": ("ffn.router.*", "gain"), "left_out": ("ffn.router.*", "gain")}
    untouched = run(Job(router=TOP_K, gain=4))
    for zero in (1, 3):
        outcome = run(stage(job, settings, router=TOP_K, gain=4, stage=zero, stop=0))
        own = {key: value for key, value in untouched.at_end.items() if "router" in key or "gain" in key}
        assert len(own) == 4
        theirs = {k: v for k, v in parameters(source.at_save).items() if "router" not in k and "gain" not in k}
        assert_same(outcome.at_save, own | theirs)
        account = outcome.state
        assert {entry["name"] for entry in account["new"]["entries"]} == {"ffn.router.gate.weight", "gain"}
        stored = {name: tensor for name, tensor in read(job.save).items() if name.startswith(KINDS)}
        tensors = {name.partition("/")[2].partition("[")[0] for name in stored}
        assert account["loaded"]["tensors"] + account["left_out"]["tensors"] == len(tensors)
        held = sum(tensor.numel() for tensor in stored.values())
        assert account["loaded"]["parameters"] + account["left_out"]["parameters"] == held


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_what_was_trained_may_be_frozen_and_the_other_way_round(zero, tmp_path):
    """In bf16, a weight that becomes frozen is its rounded master, and a new master equals the once frozen weight."""
    first = Job(bf16=True, stop=2, save=str(tmp_path / "step_00000002"), save_at=2)
    source = run(first)
    second = run(stage(first, stage=zero, bf16=True, trainable=("ffn.experts.*",), save=str(tmp_path / "step_2")))
    assert_same(
        {key: value for key, value in second.at_save.items() if key.startswith("working")},
        {key: value for key, value in source.at_save.items() if key.startswith("working")},
    )
    masters = {key: value for key, value in second.at_save.items() if key.startswith("master")}
    assert_same(masters, {key: source.at_save[key] for key in masters})
    assert len(masters) == 8  # gate_up and down of four experts
    third = run(stage(replace(first, save=str(tmp_path / "step_2")), stage=zero, bf16=True, stop=0))
    for key, working in third.at_save.items():
        if key.startswith("working") and key.replace("working", "master") in third.at_save:
            master = third.at_save[key.replace("working", "master")]
            kept = key.replace("working", "master")
            assert torch.equal(master, masters[kept] if kept in masters else second.at_save[key].float()), key
            assert torch.equal(working, master.bfloat16()), key


# --- faults, on every rank, before anything is changed


@pytest.mark.parametrize(
    ("settings", "changes", "sentence"),
    [
        ({}, {"router": TOP_K}, "the model has no place for the checkpoint's 'ffn.router."),
        ({"left_out": ("ffn.router.*",)}, {"router": TOP_K}, "has nothing for the model's 'ffn.router.gate.weight'"),
        ({"left_out": ("ffn.ruoter.*",)}, {"router": TOP_K}, "init_from.left_out: 'ffn.ruoter.*' matches no param"),
        ({}, {"gain": 4}, "the checkpoint's 'gain' is [3], the model's 'gain' is [4]"),
        ({"rename": WRAP}, {}, "(renamed 'inner."),
    ],
)
def test_faults_are_told_by_every_rank(settings, changes, sentence, saved):
    sentences = run_ranks(attempt, 2, stage(saved[0], settings, **changes))
    assert sentences[0] == sentences[1]
    assert sentence in sentences[0], sentences[0]


def test_a_damaged_checkpoint_is_named(copied):
    folder, job = copied
    data = bytearray((folder / "rank_00001.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "rank_00001.safetensors").write_bytes(data)
    for sentence in run_ranks(attempt, 2, stage(replace(job, save=str(folder)))):
        assert f"{folder / 'rank_00001.safetensors'} is damaged" in sentence


def test_the_account_is_json_and_a_table():
    account = match(GOOD, STORED, MODEL)
    assert isinstance(account, Account)
    assert json.loads(json.dumps(account.to_json()))["init_from"]["checkpoint"] == "x"
    columns = [list(column.cells) for column in account.table().columns]
    assert columns == [
        ["loaded", "new", "left_out"],
        ["4", "1", "1"],
        ["160", "8", "4"],
        ["2 renamed", "*.router", "*.head"],
    ]
