"""Frozen weights are written once a run, in a store that all its checkpoints refer to by digest."""

import hashlib
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from moe_dist.checkpoint import checkpoint
from moe_dist.checkpoint.checkpoint import checkpoint_path, newest_complete, prune, verify_checkpoint
from moe_dist.checkpoint.fragments import fragments
from moe_dist.checkpoint.manifest import frozen_digest
from moe_dist.checkpoint.stored_weights import read_tensors
from moe_dist.config.model_section import ModelConfig
from moe_dist.convert.hugging_face import export_folder, import_folder
from moe_dist.convert.inspection import inspect
from moe_dist.core import tensor_files
from moe_dist.core.errors import UserError
from moe_dist.core.files import StoredFile, write_json
from moe_dist.core.strict import validate
from tests.checkpoint.test_checkpoint import read
from tests.checkpoint.test_saver import make_saver, state_of
from tests.support.checkpoint_jobs import Job, assert_same, attempt, attempt_with_a_small_disk, build, run, run_on_rank
from tests.support.distributed import run_ranks
from tests.support.model_batches import LLAMA
from tests.support.toy_model import objective, step_batches

DOWN = ("*.experts.down",)  # half of the experts' weights


def _save_three_times(rank, job, folder, asynchronous):
    """Return the number of this rank's trained elements in ZeRO's partition."""
    engine, _, saver, train = make_saver(job, folder, asynchronous=asynchronous, keep=2)
    with saver:
        for step in range(3):
            train(step)
            saver.save(step + 1, state_of(step + 1))
            saver.wait()
            if step == 0:
                written = snapshot(folder)
    assert snapshot(folder) == written, "the store is not touched again"
    return sum(f.tensor.numel() for f in fragments(engine) if f.name.startswith("master/"))


def snapshot(folder):
    store = Path(folder) / "checkpoints" / "frozen"
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (store, *store.rglob("*"))}


def size(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize(("stage", "bf16", "asynchronous"), [(1, True, True), (3, False, False)])
def test_a_save_has_the_size_of_what_is_trained(stage, bf16, asynchronous, tmp_path):
    job = Job(stage=stage, bf16=bf16, transformer=True, trainable=DOWN)
    trained = sum(run_ranks(_save_three_times, 2, job, str(tmp_path), asynchronous))
    paths = [checkpoint_path(tmp_path, step) for step in (2, 3)]
    assert sorted((tmp_path / "checkpoints").iterdir()) == [tmp_path / "checkpoints" / "frozen", *paths]
    (store,) = (tmp_path / "checkpoints" / "frozen").iterdir()
    for path in paths:
        assert size(path) <= 1.1 * 12 * trained, "weights and two moments in float32"
        assert frozen_digest(path) == store.name
        names = {name.partition("/")[0] for name in json.loads((path / "index.json").read_text())["tensors"]}
        assert names == {"master", "exp_avg", "exp_avg_sq"}
    dtypes = {entry["dtype"] for entry in json.loads((store / "index.json").read_text())["tensors"].values()}
    assert dtypes == {"BF16" if bf16 else "F32"}, "frozen weights have the working precision"
    assert size(store) > (2 if bf16 else 4) * trained


def test_a_resumed_run_at_another_layout_refers_to_the_same_store(saved, copied, tmp_path):
    (_, source), (folder, job) = saved, copied
    before = snapshot(tmp_path)
    path = checkpoint_path(tmp_path, 3)
    again = run(replace(job, world=1, expert=1, stage=3, save=str(path), save_at=3), follow=source)
    assert snapshot(tmp_path) == before and frozen_digest(path) == frozen_digest(folder)
    (tmp_path / "checkpoints").rename(tmp_path / "moved")
    rest = run(job.resumed(load=str(tmp_path / "moved" / path.name), start=3, stop=3, stage=2))
    assert_same(rest.at_save, again.at_save)


def test_a_run_that_resumes_from_another_run_has_its_own_store(saved, copied, tmp_path):
    (_, source), (folder, job) = saved, copied
    path = checkpoint_path(tmp_path / "other", 2)
    run(replace(job, save=str(path), save_at=2), follow=source)
    shutil.rmtree(folder.parent)
    assert_same(run(job.resumed(load=str(path))).at_save, source.at_save)


def _save_without_its_store(rank, folder):
    engine, layout = build(Job())
    for step in (0, 1):
        if rank == 0 and step == 1:
            shutil.rmtree(Path(folder) / "checkpoints" / "frozen")
        checkpoint.save(checkpoint_path(folder, step), engine, layout, state={})


def test_a_store_that_is_lost_during_a_run_is_written_again(tmp_path):
    run_ranks(_save_without_its_store, 2, str(tmp_path))
    for step in (0, 1):
        verify_checkpoint(checkpoint_path(tmp_path, step))


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


LOST = "restore it: the checkpoints of this run cannot be read without their frozen weights"


@pytest.mark.parametrize(
    ("name", "damage", "sentence"),
    [
        ("rank_00001.safetensors", flip, "{file} is damaged: its checksum differs from the one in manifest.json; "),
        ("rank_00000.safetensors", Path.unlink, "{file} is missing; "),
        ("index.json", cut, "{file} has "),
        ("manifest.json", flip, "{file} is damaged; "),
        ("", shutil.rmtree, "the frozen weights in {file} cannot be read; "),
    ],
)
def test_a_damaged_store_is_one_sentence(name, damage, sentence, copied):
    folder, job = copied
    (store,) = (folder.parent / "frozen").iterdir()
    file = store / name if name else store
    damage(file)
    sentence = sentence.format(file=file)
    for told in run_ranks(attempt, 2, job):
        assert sentence in told and LOST in told
    for use in (read_tensors, lambda path: inspect(path.parent.parent, print)):
        with pytest.raises(UserError) as caught:
            use(folder)
        assert sentence in str(caught.value) and LOST in str(caught.value)
    if "checksum" not in sentence:  # sizes are compared
        with pytest.raises(UserError, match=LOST):
            newest_complete(folder.parent.parent)
    prune(folder.parent.parent, keep=1)
    assert folder.exists() and (not name or store.exists()), "nothing is removed as long as a checkpoint is damaged"


def test_verify_covers_both_parts(copied, capsys):
    folder, _ = copied
    shutil.copytree(folder, folder.with_name("step_00000003"))
    inspect(folder.parent.parent, print)
    files = [file for part in (folder, folder.parent / "frozen") for file in part.rglob("*.*")]
    for line in capsys.readouterr().out.splitlines():
        assert f": {len(files) - 2} files, {len(read(folder))} tensors, " in line, "all but the manifests"
        assert "MiB (0.0 of them frozen weights): all as written" in line


def inside(folder):
    """Put the frozen weights into their checkpoint, as in format 1."""
    manifest, index = (json.loads((folder / name).read_text()) for name in ("manifest.json", "index.json"))
    store = folder.parent / "frozen" / manifest["frozen"]
    for name, entry in json.loads((store / "index.json").read_text())["tensors"].items():
        pieces = [[start, numel, f"frozen_{file}"] for start, numel, file in entry["pieces"]]
        index["tensors"][name] = entry | {"pieces": pieces}
    files = [write_json(folder / "index.json", index)]
    for file in store.glob("*.safetensors"):
        moved = shutil.move(file, folder / f"frozen_{file.name}")
        content = moved.read_bytes()
        files.append(StoredFile(moved.name, len(content), hashlib.sha256(content).hexdigest()))
    shutil.rmtree(store.parent)
    entries = manifest["files"] | {file.name: {"bytes": file.size, "sha256": file.sha256} for file in files}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": entries}))


def test_a_checkpoint_with_frozen_weights_inside_is_read(saved, copied):
    """The next save writes a store."""
    (_, source), (folder, job) = saved, copied
    wanted = {name: tensor.read() for name, tensor in read_tensors(folder).items()}
    inside(folder)
    assert frozen_digest(folder) is None
    assert_same({name: tensor.read() for name, tensor in read_tensors(folder).items()}, wanted)
    path = checkpoint_path(folder.parent.parent, 2)
    other = run(replace(job, world=1, expert=1, stage=3, stop=2, save=str(path), save_at=2))
    assert_same(other.at_save, source.at_save)
    assert frozen_digest(path) is not None
    assert_same({name: tensor.read() for name, tensor in read_tensors(path).items()}, wanted)


def test_stores_that_nothing_refers_to_are_pruned(tmp_path):
    """A store is kept for a checkpoint that was set aside. It goes with it."""
    old = checkpoint_path(tmp_path, 1)
    run(Job(save=str(old)))
    aside = old.rename(old.with_suffix(".aside"))
    new = checkpoint_path(tmp_path, 0)
    run(Job(bf16=True, save=str(new)))
    prune(tmp_path, keep=1)
    stores = {path.name for path in (tmp_path / "checkpoints" / "frozen").iterdir()}
    assert stores == {frozen_digest(aside), frozen_digest(new)} and len(stores) == 2
    verify_checkpoint(aside)
    shutil.rmtree(aside)
    prune(tmp_path, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints" / "frozen").iterdir()] == [frozen_digest(new)]
    verify_checkpoint(new)


def _save_and_die(rank, job, moment):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 0 and moment == "written":
        tensor_files._bytes_of = die
    if rank == 0 and moment in ("renamed", "referred to"):
        rename, left = Path.rename, [1 if moment == "referred to" else 0]
        Path.rename = lambda path, to: rename(path, to) if left and left.pop() else die()
    run_on_rank(rank, job)


@pytest.mark.parametrize("moment", ["written", "renamed", "referred to"])
def test_a_kill_while_the_store_is_written(moment, tmp_path):
    job = Job(save=str(checkpoint_path(tmp_path, 0)))
    with pytest.raises(RuntimeError, match="the process died"):
        run_ranks(_save_and_die, 2, job, moment)
    assert newest_complete(tmp_path) is None
    (left,) = (tmp_path / "checkpoints" / "frozen").iterdir()
    assert (left.name == "new.tmp") == (moment != "referred to")
    run(replace(job, stage=3))
    prune(tmp_path, keep=1)
    verify_checkpoint(job.save)
    assert [path.name for path in left.parent.iterdir()] == [frozen_digest(job.save)]


def test_a_full_disk_while_the_store_is_written(tmp_path):
    path = checkpoint_path(tmp_path, 0)
    for sentence in run_ranks(attempt_with_a_small_disk, 2, Job(save=str(path)), 200):
        assert sentence == f"cannot write the checkpoint {path}: [Errno 27] File too large (rank 1)"
    assert not [file for file in (tmp_path / "checkpoints").rglob("*") if file.is_file()]


def _save_in_the_middle(rank, path):
    """Train the routers of a model with the form of Mixtral, and save it with its recipe's section `model`."""
    router = {"type": "top_k", "num_experts": 4, "top_k": 2, "renormalize": True}
    section = LLAMA | {"hidden_size": 32, "num_layers": 2, "num_heads": 4}
    section |= {"ffn": {"type": "moe", "hidden_size": 48, "router": router}}
    engine, layout = build(Job(stage=3, model=validate(ModelConfig, section, "test"), trainable=("*.router.*",)))
    engine.train_step(step_batches(0, rank, 2, groups=4), objective, 0.01)
    checkpoint.save(path, engine, layout, state={"step": 1, "config": {"model": section}})


def test_both_parts_are_exported(tmp_path):
    path = checkpoint_path(tmp_path / "run", 1)
    run_ranks(_save_in_the_middle, 2, str(path))
    kinds = {name.partition("[")[0]: kind for kind, _, name in (name.partition("/") for name in read(path))}
    assert kinds["layers.0.ffn.router.gate.weight"] == "exp_avg_sq" and kinds["embedding.weight"] == "frozen"
    export_folder(tmp_path / "run", tmp_path / "hugging_face")
    import_folder(tmp_path / "hugging_face", tmp_path / "back")
    tensors, back = ({name: t.read() for name, t in read_tensors(p).items()} for p in (path, tmp_path / "back"))
    assert_same(back, tensors)


def test_a_model_without_frozen_weights_has_no_store(tmp_path):
    path = checkpoint_path(tmp_path, 0)
    run(Job(save=str(path), transformer=True))
    assert [folder.name for folder in path.parent.iterdir()] == [path.name] and frozen_digest(path) is None
    assert not [name for name in read(path) if name.startswith("frozen/")]
