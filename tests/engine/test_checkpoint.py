"""Checkpoints of real ZeRO engines on real ranks: exact at any layout, complete or absent, never of a wrong model."""

import itertools
import json
import math
import os
import pickle
import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_dist.engine import checkpoint, storage
from moe_dist.engine.fragments import fragments
from moe_dist.errors import UserError
from tests.distributed import run_ranks
from tests.engine.checkpoint_jobs import Job, attempt, build, run, run_on_rank
from tests.engine.toy import TOP_K

LAYOUTS = [  # world, expert, stage
    (1, 1, 1), (2, 1, 2), (2, 2, 1), (2, 2, 3), (4, 2, 1), (4, 4, 2), (4, 2, 3),
]  # fmt: skip
SMALL = LAYOUTS[:4]


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A job on two ranks with a checkpoint of step 2, and its outcome."""
    job = Job(stop=4, save=str(tmp_path_factory.mktemp("run") / "checkpoints" / "step_00000002"), save_at=2)
    return job, run(job)


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of that checkpoint to be damaged, and the job that would resume from it."""
    job, _ = saved
    folder = tmp_path / "checkpoints" / "step_00000002"
    folder.mkdir(parents=True)
    for file in Path(job.save).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder, replace(job.resumed(stop=3), load=str(folder))


@pytest.mark.parametrize("stage, optimizer", [(1, "AdamW"), (2, "AdamW"), (3, "AdamW"), (1, "SGD")])
def test_resume_is_bitwise_the_uninterrupted_run(stage, optimizer, tmp_path):
    job = Job(stage=stage, optimizer=optimizer, threads=2, stop=4, save=str(tmp_path / "step_00000002"), save_at=2)
    whole, rest = run(job), run(job.resumed())
    assert rest.losses == whole.losses[2:] and rest.norms == whole.norms[2:]
    assert len(set(whole.losses)) == 4
    assert_same(rest.at_save, whole.at_save)
    assert_same(rest.at_end, whole.at_end)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_resume_of_the_real_model_is_bitwise_on_two_threads(stage, tmp_path):
    """Wide enough that its operations really run on two threads."""
    job = Job(transformer=True, stage=stage, threads=2, stop=4, save=str(tmp_path / "step_00000002"), save_at=2)
    whole, rest = run(job), run(job.resumed())
    assert rest.losses == whole.losses[2:] and rest.norms == whole.norms[2:]
    assert_same(rest.at_end, whole.at_end)
    single = run(job.resumed(world=1, expert=1, stage=2))
    assert_same(single.at_save, whole.at_save)
    assert single.losses == pytest.approx(whole.losses[2:], rel=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_resume_with_an_offloaded_optimizer(stage, tmp_path):
    job = Job(stage=stage, offload=True, stop=4, save=str(tmp_path / "step_00000002"), save_at=2)
    whole, rest = run(job), run(job.resumed())
    assert rest.losses == whole.losses[2:]
    assert_same(rest.at_end, whole.at_end)
    back = run(job.resumed(offload=False, stage=1))
    assert_same(back.at_save, whole.at_save)
    assert back.losses == pytest.approx(whole.losses[2:], rel=1e-5)


def check_pairs(layouts, tmp_path, **settings):
    """Save once at each layout, load at every one: state exact, next losses as the unchanged layout's."""
    for number, (world, expert, stage) in enumerate(layouts):
        path = str(tmp_path / f"{number}" / "step_00000002")
        job = Job(world, expert, stage, stop=4, save=path, save_at=2, **settings)
        source = run(job)
        for new_world, new_expert, new_stage in layouts:
            other = run(job.resumed(world=new_world, expert=new_expert, stage=new_stage))
            assert_same(other.at_save, source.at_save)
            assert other.losses == pytest.approx(source.losses[2:], rel=1e-5)


def test_any_layout_to_any_on_two_ranks(tmp_path):
    check_pairs(SMALL, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("router", ["moma", "top_k"])
def test_any_layout_to_any_on_four_ranks(router, tmp_path):
    check_pairs(LAYOUTS, tmp_path, **({"router": TOP_K} if router == "top_k" else {}))


def test_bf16_keeps_float32_masters(tmp_path):
    job = Job(bf16=True, stop=4, save=str(tmp_path / "step_00000002"), save_at=2)
    source = run(job)
    assert source.at_save["master output.weight"].dtype == torch.float32
    assert source.at_save["working output.weight"].dtype == torch.bfloat16
    assert source.at_save["working tilt"].dtype == torch.bfloat16  # frozen
    for world, expert, stage in SMALL:
        other = run(job.resumed(world=world, expert=expert, stage=stage))
        assert_same(other.at_save, source.at_save)
        assert other.losses == pytest.approx(source.losses[2:], rel=1e-3)


def test_before_the_first_step_there_are_no_moments(tmp_path):
    job = Job(stop=2, save=str(tmp_path / "step_00000000"))
    source = run(job)
    for stage in (1, 3):
        assert run(job.resumed(stage=stage)).losses == pytest.approx(source.losses, rel=1e-6)
    assert {name.split("/")[0] for name in read(tmp_path / "step_00000000")} == {"master", "frozen", "buffer"}


def test_state_of_all_ranks_is_united(saved):
    job, _ = saved
    lanes = {str(lane): {"cursor": 200 + lane} for lane in range(4)}
    assert run(job.resumed()).state == {"step": 2, "loader": {"lanes": lanes}}


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
    """Full logical tensors by nothing but the safetensors library; every element must be stored exactly once."""
    index = json.loads((Path(folder) / "index.json").read_text())["tensors"]
    files = {path.name: load_file(path) for path in Path(folder).glob("*.safetensors")}
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


def _load_without_pickle(rank, job):
    def refuse(*_, **__):
        raise AssertionError("a checkpoint was unpickled")

    kept = pickle.load, torch.load
    pickle.load = torch.load = refuse
    try:
        run_on_rank(rank, job)
    finally:
        pickle.load, torch.load = kept


def test_loading_unpickles_nothing(saved):
    job, _ = saved
    assert {path.suffix for path in Path(job.save).iterdir()} == {".json", ".safetensors"}
    run_ranks(_load_without_pickle, 1, job.resumed(world=1, expert=1))


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "rank_00001.safetensors", "index.json", "state.json"])
def test_a_damaged_file_is_named_on_every_rank(name, copied):
    folder, job = copied
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    for sentence in run_ranks(attempt, 2, job):
        assert f"{folder / name} is damaged" in sentence
    (folder / name).write_bytes(data[:-1])
    assert checkpoint.newest_complete(folder.parent.parent) is None
    for sentence in run_ranks(attempt, 2, job):
        assert f"{folder / name} has {len(data) - 1} bytes, not {len(data)}" in sentence
    (folder / name).unlink()
    for sentence in run_ranks(attempt, 2, job):
        assert f"{folder / name} is missing" in sentence


def test_a_damaged_manifest(copied):
    folder, _ = copied
    text = (folder / "manifest.json").read_text()
    for damaged in (text[:-5], "[]", text.replace('"bytes": ', '"bytes": "x', 1)):
        (folder / "manifest.json").write_text(damaged)
        with pytest.raises(UserError, match=r"manifest\.json is damaged"):
            checkpoint.verify(folder)
    (folder / "manifest.json").write_text(text.replace('"format": 1', '"format": 9'))
    with pytest.raises(UserError, match="format 9 is not known"):
        checkpoint.verify(folder)


def test_a_gap_between_the_pieces(copied):
    folder, job = copied
    index = json.loads((folder / "index.json").read_text())
    index["tensors"]["master/embedding.weight"]["pieces"].pop()
    new = storage.write_json(folder / "index.json", index)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["index.json"] = {"bytes": new.size, "sha256": new.sha256}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for sentence in run_ranks(attempt, 2, job):
        assert "the stored pieces of 'master/embedding.weight' leave a gap" in sentence


def test_another_model_is_named(saved):
    job, _ = saved
    for sentence in run_ranks(attempt, 2, job.resumed(router=TOP_K)):
        assert "another model: it has no 'master/ffn.router.gate.weight'" in sentence
        assert "1 are missing" in sentence and "2 are surplus" in sentence
    for sentence in run_ranks(attempt, 2, job.resumed(gain=4)):
        assert "its 'master/gain' is F32[3], the model's is F32[4]" in sentence
    for sentence in run_ranks(attempt, 2, job.resumed(optimizer="SGD")):
        assert "holds the optimizer moments ['exp_avg', 'exp_avg_sq'], this run's optimizer keeps ['mom" in sentence


def _save_with_a_small_disk(rank, job):
    """Rank 1 may write no file over 2,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        return attempt(rank, job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_on_one_rank_is_told_by_all_and_leaves_the_old_checkpoint(copied):
    folder, job = copied
    path = folder.with_name("step_00000003")
    sentences = run_ranks(_save_with_a_small_disk, 2, replace(job, save=str(path), save_at=3))
    assert sentences[0] == sentences[1]
    assert f"cannot write the checkpoint {path}: [Errno 27] File too large" in sentences[0]
    assert "(rank 1)" in sentences[0]
    assert sorted(folder.parent.iterdir()) == [folder]
    checkpoint.verify(folder)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    for sentence in run_ranks(attempt, 2, Job(save=str(tmp_path / "checkpoints" / "step_00000000"))):
        assert "cannot write the checkpoint" in sentence


def _save_and_die(rank, job, moment):
    """Rank 0 is killed while it writes its file, or just before the checkpoint becomes visible."""

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 0 and moment == "writing":
        calls = itertools.count()
        original = storage._bytes_of
        storage._bytes_of = lambda tensor: die() if next(calls) == 5 else original(tensor)
    if rank == 0 and moment == "committing":
        Path.rename = die
    run_on_rank(rank, job)


@pytest.mark.parametrize("moment, left", [("writing", set()), ("committing", {"manifest.json", "state.json"})])
def test_a_kill_leaves_the_old_checkpoint(moment, left, copied):
    folder, job = copied
    path = folder.with_name("step_00000003")
    with pytest.raises(RuntimeError, match="the process died"):
        run_ranks(_save_and_die, 2, replace(job, save=str(path), save_at=3), moment)
    partial = folder.with_name("step_00000003.tmp")
    names = {file.name for file in partial.iterdir()}  # the kill landed where it was meant to
    assert "rank_00000.safetensors" in names and names >= left and ("index.json" in names) == bool(left)
    assert not path.exists()
    run_dir = folder.parent.parent
    assert checkpoint.newest_complete(run_dir) == folder
    run(job)
    checkpoint.prune(run_dir, keep=1)
    assert sorted(folder.parent.iterdir()) == [folder]


def test_the_same_step_can_be_saved_again(tmp_path):
    job = Job(stop=1, save=str(tmp_path / "step_00000001"), save_at=1)
    run(job)
    again = run(replace(job, stage=3))
    assert_same(run(job.resumed()).at_save, again.at_save)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
