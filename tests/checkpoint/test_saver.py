"""A background save writes the bytes of a synchronous one, whatever training does meanwhile, and loses no error."""

import json
import resource
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from moe_dist.checkpoint import checkpoint
from moe_dist.checkpoint.checkpoint import checkpoint_path, newest_complete
from moe_dist.checkpoint.saver import HostBuffers, Saver
from moe_dist.checkpoint.storage import Fragment
from moe_dist.config.recipe import CheckpointConfig
from moe_dist.core import tensor_files
from moe_dist.core.errors import UserError
from tests.support.checkpoint_jobs import Job, build
from tests.support.distributed import run_ranks
from tests.support.toy_model import objective, step_batches

FROZEN_EXPERTS = ("ffn.router.*", "gain")


@contextmanager
def held_back():
    """Hold back the background writer of this process until the event is set."""
    event, original = threading.Event(), tensor_files._bytes_of

    def bytes_of(tensor):
        if threading.current_thread() is not threading.main_thread():
            event.wait()
        return original(tensor)

    tensor_files._bytes_of = bytes_of
    try:
        yield event
    finally:
        event.set()
        tensor_files._bytes_of = original


def make_saver(job, folder, **settings):
    torch.set_num_threads(1)
    engine, layout = build(job)
    saver = Saver(folder, engine, layout, CheckpointConfig(**settings))

    def train(step):
        return engine.train_step(step_batches(step, layout.rank, job.world, groups=4), objective, 0.01).loss_sums

    return engine, layout, saver, train


def state_of(step):
    return {"step": step, "loader": {"lanes": {str(lane): step + lane for lane in range(4)}}}


def _save_both_ways(rank, job, folder):
    engine, layout, saver, train = make_saver(job, folder)
    with saver:
        for step in range(2):
            train(step)
        with held_back() as go_on:
            saver.save(2, state_of(2))
            checkpoint.save(Path(folder) / "synchronous", engine, layout, state=state_of(2))
            train(2), train(3)  # every parameter and moment moves; so does the buffer
            assert newest_complete(folder) is None, "nothing is visible before it is whole"
            go_on.set()
            saver.wait()
        checkpoint.save(Path(folder) / "later", engine, layout, state=state_of(2))


@pytest.mark.parametrize(
    "settings",
    [
        {"stage": 1},
        {"stage": 3, "bf16": True},
        {"stage": 2, "trainable": FROZEN_EXPERTS},
        {"stage": 2, "offload": True},
        {"world": 1, "expert": 1},
    ],
)
def test_what_is_written_while_training_goes_on_is_the_checkpoint_of_its_step(settings, tmp_path):
    job = Job(**settings)
    run_ranks(_save_both_ways, job.world, job, str(tmp_path))
    path = checkpoint_path(tmp_path, 2)
    checkpoint.verify_checkpoint(path)
    manifests = [json.loads((p / "manifest.json").read_text()) for p in (path, tmp_path / "synchronous")]
    assert manifests[0] == manifests[1], "a manifest holds the SHA-256 of every file"
    later = json.loads((tmp_path / "later" / "manifest.json").read_text())
    changed = [name for name, file in later["files"].items() if file != manifests[0]["files"][name]]
    assert {*changed} == {"state.json", *(f"rank_{rank:05d}.safetensors" for rank in range(job.world))}


def _save_every_step(rank, job, folder, asynchronous):
    _, _, saver, train = make_saver(job, folder, asynchronous=asynchronous, keep=9)
    with saver:
        losses = []
        for step in range(8):
            losses.append(train(step)["loss"])
            saver.save(step + 1, state_of(step + 1))
            assert saver.metrics()["checkpoint_stall_seconds"] > 0 and saver.metrics() == {}
            if asynchronous and step == 0:
                places = {key: buffer.data_ptr() for key, buffer in saver.buffers._of.items()}
        if asynchronous:
            assert places == {key: buffer.data_ptr() for key, buffer in saver.buffers._of.items()}
    return losses, saver.buffers.nbytes


@pytest.mark.parametrize(("world", "expert"), [(2, 2), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_saving_after_every_step_changes_neither_losses_nor_checkpoints(world, expert, tmp_path):
    """Two threads of a rank communicate at the same time, and their collectives do not mix."""
    job = Job(world, expert)
    runs = {}
    for asynchronous in (True, False):
        folder = tmp_path / str(asynchronous)
        results = run_ranks(_save_every_step, world, job, str(folder), asynchronous)
        runs[asynchronous] = [losses for losses, _ in results]
        if not asynchronous:
            assert [nbytes for _, nbytes in results] == [0] * world
    assert runs[True] == runs[False] and len(set(runs[True][0])) == 8
    for step in range(1, 9):
        written = [
            (checkpoint_path(tmp_path / str(mode), step) / "manifest.json").read_text() for mode in (True, False)
        ]
        assert written[0] == written[1]


def _memory(rank, job, folder):
    engine, _, saver, train = make_saver(job, folder)
    with saver:
        saver.save(0, state_of(0))
        before = saver.buffers.nbytes
        saver.wait()
        train(0)
        saver.save(1, state_of(1))
    mine = {}  # elements of the model, an expert's under its global number
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            ids = getattr(parameter, "expert_ids", None)
            own = {name: shape.numel()} if ids is None else {f"{name}[{e}]": shape[1:].numel() for e in ids}
            mine |= own
    return mine, before, saver.buffers.nbytes


@pytest.mark.parametrize(("expert", "stage", "trainable"), [(1, 1, ("*",)), (2, 3, ("*",)), (2, 2, FROZEN_EXPERTS)])
def test_the_memory_of_a_snapshot(expert, stage, trainable, tmp_path):
    """With Adam it is 12 bytes per trained parameter over all ranks, 0 per frozen one, and 16 of buffers per rank."""
    results = run_ranks(_memory, 2, Job(2, expert, stage, trainable=trainable), str(tmp_path))
    trained = sum({name: numel for mine, _, _ in results for name, numel in mine.items()}.values())
    assert sum(before for _, before, _ in results) == 4 * trained + 2 * 16
    assert sum(after for _, _, after in results) == 12 * trained + 2 * 16


def test_no_memory_for_a_snapshot():
    huge = Fragment("master/x", (2**45,), 0, torch.zeros(1).expand(2**45))
    with pytest.raises(UserError, match=r"no memory for a snapshot of 131072\.0 GiB per rank \(checkpoint.asynch"):
        HostBuffers(pinned=False).copy([huge])


def _fill_the_disk_of_rank_1(rank, job, folder, then_save):
    """Return the error sentences of this rank's next save or of its end. Training continues until then."""
    _, _, saver, train = make_saver(job, folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with saver:
            saver.save(0, state_of(0))
            saver.wait()
            train(0)
            if rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
            saver.save(1, state_of(1))
            train(1)
            if then_save:
                saver.save(2, state_of(2))
                raise AssertionError("the error was lost")
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("then_save", [True, False])
def test_an_error_of_one_writer_is_every_ranks_at_the_next_save_or_the_end(then_save, tmp_path):
    sentences = run_ranks(_fill_the_disk_of_rank_1, 2, Job(), str(tmp_path), then_save)
    path = checkpoint_path(tmp_path, 1)
    assert sentences[0] == sentences[1]
    assert f"cannot write the checkpoint {path}: [Errno 27] File too large" in sentences[0]
    assert "(rank 1)" in sentences[0]
    left = sorted(path.parent.iterdir())
    assert left == [path.with_name("frozen"), checkpoint_path(tmp_path, 0)], "the one before is kept, the partial not"
    checkpoint.verify_checkpoint(checkpoint_path(tmp_path, 0))


def _fail_while_it_is_written(rank, job, folder):
    _, _, saver, train = make_saver(job, folder, keep=1)
    with held_back() as go_on:
        try:
            with saver:
                train(0)
                saver.save(1, state_of(1))
                threading.Timer(0.5, go_on.set).start()
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            return newest_complete(folder)


def test_an_error_of_training_waits_for_the_checkpoint_that_is_being_written(tmp_path):
    assert run_ranks(_fail_while_it_is_written, 2, Job(), str(tmp_path))[0] == checkpoint_path(tmp_path, 1)
    checkpoint.verify_checkpoint(checkpoint_path(tmp_path, 1))


def _keep_one(rank, job, folder):
    _, _, saver, train = make_saver(job, folder, keep=1)
    with saver:
        saver.save(0, state_of(0))
        saver.wait()
        with held_back() as go_on:
            train(0)
            saver.save(1, state_of(1))
            train(1)
            during = newest_complete(folder)
            go_on.set()
            saver.wait()
    return during


def test_the_older_checkpoint_goes_when_the_newer_one_is_whole(tmp_path):
    assert run_ranks(_keep_one, 2, Job(), str(tmp_path)) == [checkpoint_path(tmp_path, 0)] * 2
    assert sorted((tmp_path / "checkpoints").iterdir()) == [
        tmp_path / "checkpoints" / "frozen",
        checkpoint_path(tmp_path, 1),
    ]
