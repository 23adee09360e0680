"""Checkpoints of real ZeRO engines on real ranks are exact in any layout."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_dist.checkpoint import checkpoint
from moe_dist.checkpoint.fragments import fragments
from tests.support.checkpoint_jobs import Job, assert_same, build, run
from tests.support.distributed import run_ranks
from tests.support.long import REPEATED
from tests.support.model_batches import MOMA, model_config

SMALL = [(1, 1, 1), (2, 1, 2), (2, 2, 1), (2, 2, 3)]  # world, expert, stage; for more see test_any_layout.py


@pytest.mark.parametrize(
    "stage, optimizer", [(1, "AdamW"), (2, "AdamW"), (3, "AdamW"), pytest.param(1, "SGD", marks=pytest.mark.slow)]
)
def test_resume_is_bitwise_the_uninterrupted_run(stage, optimizer, tmp_path):
    job = Job(stage=stage, optimizer=optimizer, threads=2, stop=4, save=str(tmp_path / "step_00000002"), save_at=2)
    whole, rest = run(job), run(job.resumed())
    assert rest.losses == whole.losses[2:] and rest.norms == whole.norms[2:]
    assert len(set(whole.losses)) == 4
    assert_same(rest.at_save, whole.at_save)
    assert_same(rest.at_end, whole.at_end)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param(1, marks=REPEATED), 3])
def test_resume_of_the_real_model_is_bitwise_on_two_threads(stage, tmp_path):
    """The model is wide enough for its operations to really use two threads."""
    job = Job(transformer=True, stage=stage, threads=2, stop=4, save=str(tmp_path / "step_00000002"), save_at=2)
    whole, rest = run(job), run(job.resumed())
    assert rest.losses == whole.losses[2:] and rest.norms == whole.norms[2:]
    assert_same(rest.at_end, whole.at_end)
    single = run(job.resumed(world=1, expert=1, stage=2), follow=whole)
    assert_same(single.at_save, whole.at_save)
    assert single.losses == pytest.approx(whole.losses[2:], rel=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_resume_with_an_offloaded_optimizer(stage, tmp_path):
    job = Job(stage=stage, offload=True, stop=4, save=str(tmp_path / "step_00000002"), save_at=2)
    whole, rest = run(job), run(job.resumed())
    assert rest.losses == whole.losses[2:]
    assert_same(rest.at_end, whole.at_end)
    back = run(job.resumed(offload=False, stage=1), follow=whole)
    assert_same(back.at_save, whole.at_save)
    assert back.losses == pytest.approx(whole.losses[2:], rel=1e-5)


def check_pairs(layouts, tmp_path, **settings):
    """Save in each layout and load in every one. The state must be exact, and the next losses the old layout's."""
    for number, (world, expert, stage) in enumerate(layouts):
        path = str(tmp_path / f"{number}" / "step_00000002")
        job = Job(world, expert, stage, stop=4, save=path, save_at=2, **settings)
        source = run(job)
        for new_world, new_expert, new_stage in layouts:
            other = run(job.resumed(world=new_world, expert=new_expert, stage=new_stage), follow=source)
            assert_same(other.at_save, source.at_save)
            assert other.losses == pytest.approx(source.losses[2:], rel=1e-5)


@REPEATED
def test_any_layout_to_any_on_two_ranks(tmp_path):
    check_pairs(SMALL, tmp_path)


def test_experts_in_slices_from_any_layout_to_any_on_two_ranks(tmp_path):
    check_pairs([(1, 1, 1), (2, 2, 2)], tmp_path, model=model_config(MOMA | {"slices": 2}))


ROUTERS, EXPERT_STACK = ("ffn.router.*",), ("ffn.experts.down", "gain")


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("trainable", "stage"),
    [
        (ROUTERS, 1),
        (ROUTERS, 3),
        (EXPERT_STACK, 2),
        *(
            pytest.param(patterns, stage, marks=pytest.mark.slow)
            for patterns, stage in ((ROUTERS, 2), (EXPERT_STACK, 1), (EXPERT_STACK, 3))
        ),
    ],
)
def test_a_partly_frozen_model_resumes_bitwise(trainable, stage, bf16, tmp_path):
    path = tmp_path / "step_00000002"
    job = Job(stage=stage, bf16=bf16, threads=2, trainable=trainable, stop=4, save=str(path), save_at=2)
    whole, rest = run(job), run(job.resumed())
    assert rest.losses == whole.losses[2:] and rest.norms == whole.norms[2:]
    assert len(set(whole.losses)) == 4
    assert_same(rest.at_save, whole.at_save)
    assert_same(rest.at_end, whole.at_end)
    stored = [name.partition("[")[0].partition("/")[::2] for name in read(path)]
    trained = {f"ffn.router.{key}.gate.weight" for key in ("text", "image")}
    trained = trained if trainable is ROUTERS else {"ffn.experts.down", "gain"}
    assert {name for kind, name in stored if kind in ("master", "exp_avg", "exp_avg_sq")} == trained
    assert not {name for kind, name in stored if kind == "frozen"} & trained


@pytest.mark.slow
def test_a_partly_frozen_model_from_any_layout_to_any(tmp_path):
    check_pairs(SMALL, tmp_path, trainable=ROUTERS)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [pytest.param(ROUTERS, marks=REPEATED), EXPERT_STACK])
def test_a_partly_frozen_model_from_any_layout_to_any_on_four_ranks(trainable, tmp_path):
    check_pairs([(4, 2, 1), (2, 2, 3), (4, 4, 3)], tmp_path, trainable=trainable)


def test_bf16_keeps_float32_masters(tmp_path):
    job = Job(bf16=True, stop=4, save=str(tmp_path / "step_00000002"), save_at=2)
    source = run(job)
    assert source.at_save["master output.weight"].dtype == torch.float32
    assert source.at_save["working output.weight"].dtype == torch.bfloat16
    assert source.at_save["working tilt"].dtype == torch.bfloat16  # frozen
    for world, expert, stage in SMALL:
        other = run(job.resumed(world=world, expert=expert, stage=stage), follow=source)
        assert_same(other.at_save, source.at_save)
        assert other.losses == pytest.approx(source.losses[2:], rel=1e-3)


def test_before_the_first_step_there_are_no_moments(tmp_path):
    job = Job(stop=2, save=str(tmp_path / "step_00000000"))
    source = run(job)
    for stage in (1, 3):
        assert run(job.resumed(stage=stage), follow=source).losses == pytest.approx(source.losses, rel=1e-6)
    assert {name.split("/")[0] for name in read(tmp_path / "step_00000000")} == {"master", "frozen", "buffer"}


@pytest.mark.parametrize("stage", [1, 3])
def test_nothing_is_left_of_what_an_engine_held_before(stage, saved):
    job, source = saved
    other = run(job.resumed(stage=stage, used=True), follow=source)
    assert_same(other.at_save, source.at_save)
    assert other.losses == pytest.approx(source.losses[2:], rel=1e-5)


def test_state_of_all_ranks_is_united(saved):
    job, _ = saved
    lanes = {str(lane): {"cursor": 200 + lane} for lane in range(4)}
    assert run(job.resumed()).state == {"step": 2, "loader": {"lanes": lanes}}
    assert checkpoint.read_state(job.save) == {"step": 2, "loader": {"lanes": lanes}}


def _hold(rank, job):
    engine, _ = build(job)
    return {f.name for f in fragments(engine)}


def test_some_rank_holds_nothing_of_a_parameter():
    held = run_ranks(_hold, 2, Job(expert=1))
    assert sum("master/gain" in names for names in held) == 1
    assert all("frozen/tilt" in names for names in held)
    held = run_ranks(_hold, 2, Job(expert=2, stage=3))
    experts = [{name for name in names if "experts" in name} for names in held]
    assert experts[0] and experts[1] and not experts[0] & experts[1]


def read(folder):
    """Read full logical tensors, frozen ones too, with the safetensors library only. Every element must be stored
    exactly once.
    """
    digest = json.loads((Path(folder) / "manifest.json").read_text())["frozen"]
    frozen = {} if digest is None else read_folder(Path(folder).parent / "frozen" / digest)
    return read_folder(Path(folder)) | frozen


def read_folder(folder):
    index = json.loads((folder / "index.json").read_text())["tensors"]
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert sum(len(tensors) for tensors in files.values()) == sum(len(entry["pieces"]) for entry in index.values())
    full = {}
    for name, entry in index.items():
        pieces = sorted(entry["pieces"])
        ends = [start + size for start, size, _ in pieces]
        assert [start for start, _, _ in pieces] == [0, *ends[:-1]] and ends[-1] == math.prod(entry["shape"])
        full[name] = torch.cat([files[file][f"{name}@{start}"] for start, _, file in pieces]).view(entry["shape"])
    return full


@pytest.mark.parametrize("expert, stage", [(1, 1), (2, 1), (2, 3)])
def test_every_element_is_written_once_and_is_the_right_one(expert, stage, tmp_path):
    folder = tmp_path / "step_00000002"
    outcome = run(Job(expert=expert, stage=stage, stop=2, save=str(folder), save_at=2))
    stored = read(folder)
    for name, tensor in outcome.at_save.items():
        kind, _, rest = name.partition(" ")
        parameter, _, row = rest.partition(" of ")
        if kind in ("master", "exp_avg", "exp_avg_sq"):
            assert torch.equal(stored[f"{kind}/{parameter}[{row}]" if row else f"{kind}/{parameter}"], tensor), name
    assert torch.equal(stored["frozen/tilt"], outcome.at_save["working tilt"])
    assert torch.equal(stored["frozen/base[3]"], outcome.at_save["working base of 3"])
    assert "buffer/calls" in stored and "buffer/scratch" not in stored
