"""Damaged files, other models, full disks, kills: every rank reports it, and the older checkpoint stays intact."""

import itertools
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from moe_dist.checkpoint import checkpoint
from moe_dist.core import files, tensor_files
from moe_dist.core.errors import UserError
from tests.support.checkpoint_jobs import Job, assert_same, attempt, attempt_with_a_small_disk, run, run_on_rank
from tests.support.distributed import run_ranks
from tests.support.toy_model import TOP_K


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "rank_00001.safetensors", "index.json", "state.json"])
def test_a_damaged_file_is_named_on_every_rank(name, copied):
    folder, job = copied
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    for sentence in run_ranks(attempt, 2, job):
        assert f"{folder / name} is damaged" in sentence
    (folder / name).write_bytes(data[:-1])
    with pytest.raises(UserError, match=f"{name} has .* bytes, not .*; restore it, or move {folder} away"):
        checkpoint.newest_complete(folder.parent.parent)
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
            checkpoint.verify_checkpoint(folder)
        with pytest.raises(UserError, match=r"manifest\.json is damaged"):
            checkpoint.read_state(folder)
    (folder / "manifest.json").write_text(text.replace('"format": 2', '"format": 9'))
    with pytest.raises(UserError, match="format 9 is not known"):
        checkpoint.verify_checkpoint(folder)


def test_a_gap_between_the_pieces(copied):
    folder, job = copied
    index = json.loads((folder / "index.json").read_text())
    index["tensors"]["master/embedding.weight"]["pieces"].pop()
    new = files.write_json(folder / "index.json", index)
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


def test_a_full_disk_on_one_rank_is_told_by_all_and_leaves_the_old_checkpoint(copied):
    folder, job = copied
    path = folder.with_name("step_00000003")
    sentences = run_ranks(attempt_with_a_small_disk, 2, replace(job, save=str(path), save_at=3), 2000)
    assert sentences[0] == sentences[1]
    assert f"cannot write the checkpoint {path}: [Errno 27] File too large" in sentences[0]
    assert "(rank 1)" in sentences[0]
    assert sorted(folder.parent.iterdir()) == [folder.parent / "frozen", folder]
    checkpoint.verify_checkpoint(folder)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    for sentence in run_ranks(attempt, 2, Job(save=str(tmp_path / "checkpoints" / "step_00000000"))):
        assert "cannot write the checkpoint" in sentence


def _save_and_die(rank, job, moment):
    """Kill rank 0 while it writes its file, or just before the checkpoint becomes visible."""

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 0 and moment == "writing":
        calls = itertools.count()
        original = tensor_files._bytes_of
        tensor_files._bytes_of = lambda tensor: die() if next(calls) == 5 else original(tensor)
    if rank == 0 and moment == "committing":
        Path.rename = die
    run_on_rank(rank, job)


@pytest.mark.parametrize(
    "moment, left",
    [pytest.param("writing", set(), marks=pytest.mark.slow), ("committing", {"manifest.json", "state.json"})],
)
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
    assert sorted(folder.parent.iterdir()) == [folder.parent / "frozen", folder]


def test_the_same_step_can_be_saved_again(tmp_path):
    job = Job(stop=1, save=str(tmp_path / "step_00000001"), save_at=1)
    run(job)
    again = run(replace(job, stage=3))
    assert_same(run(job.resumed()).at_save, again.at_save)
    assert {path.name for path in tmp_path.iterdir()} == {"frozen", "step_00000001"}
