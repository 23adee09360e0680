"""The whole job as a user starts it: real launchers, two ranks, real shards, real DeepSpeed; small enough for tests."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_dist.engine.checkpoint import read_state
from moe_dist.telemetry.keys import undeclared
from moe_dist.telemetry.run_folder import read_status

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
DEEPSPEED = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
MPIEXEC = [str(BIN / "mpiexec"), "-n", "2", sys.executable]
ALONE = [sys.executable]


@pytest.fixture
def overrides(emoji_shards, tokenizers, tmp_path):
    """The quickstart in small: the same model and launcher, the fixtures' pairs, eight steps."""
    return [
        f"run.dir={tmp_path / 'run'}",
        f"data.shards={shutil.copytree(emoji_shards, tmp_path / 'shards')}",
        f"data.text_tokenizer={tokenizers / 'text.model'}",
        f"data.image_tokenizer={tokenizers / 'vq'}",
        *["data.sequence_length=128", "data.group_sequences=2", "data.lanes=4"],
        *["model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.ffn.hidden_size=32"],
        *["train.steps=8", "schedule.warmup_steps=2", "eval.every=4", "eval.groups=2", "checkpoint.every=4"],
    ]


def launch(launcher, overrides, *, config="configs/moma_quickstart.yaml", threads=1):
    """Run launch/train.py; 'PORT' stands in for a free port of the deepspeed launcher."""
    if launcher is DEEPSPEED:
        launcher = [*DEEPSPEED, str(20000 + os.getpid() % 20000)]
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return subprocess.run(
        [*launcher, "launch/train.py", "--config", config, *overrides],
        cwd=ROOT,
        env=clean | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "PATH": f"{BIN}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=400,
    )


def metrics_of(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_main_job_and_an_exact_resume(overrides, tmp_path):
    """Two threads a rank; stopped after 4 of 8 steps and resumed, against an undisturbed run: bitwise the same."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert launch(DEEPSPEED, [*overrides, f"run.dir={whole}"], threads=2).returncode == 0
    first = launch(DEEPSPEED, [*overrides, f"run.dir={parts}", "train.stop_after=4"], threads=2)
    assert first.returncode == 0, first.stderr
    assert read_status(parts) | {"updated": 0} == {"state": "stopped", "step": 4, "reason": None, "updated": 0}
    second = launch(DEEPSPEED, [*overrides, f"run.dir={parts}"], threads=2)
    assert second.returncode == 0, second.stderr
    assert read_status(parts)["state"] == "done"

    lines = metrics_of(whole)
    assert [line["step"] for line in lines] == list(range(1, 9)) == [line["step"] for line in metrics_of(parts)]
    timed = ("seconds", "per_second")
    for straight, resumed in zip(lines, metrics_of(parts), strict=True):
        assert {k: v for k, v in straight.items() if not k.endswith(timed)} == {
            k: v for k, v in resumed.items() if not k.endswith(timed)
        }
    assert lines[0]["loss"] - lines[-1]["loss"] > 0.02  # it learns, so equality is not that of a run that stands still
    last = "checkpoints/step_00000008"
    assert _stored(whole / last) == _stored(parts / last)
    states = [read_state(run / last) for run in (whole, parts)]
    for key in ("step", "tokens", "loader"):  # what would be read next, too
        assert states[0][key] == states[1][key]

    assert undeclared(lines[-1]) == []
    for key in ("eval/loss/text", "eval/loss/image", "moe/1/utilization", "moe/rank_imbalance", "data_wait_seconds"):
        assert key in lines[-1]
    for name in ("config.yaml", "loss.png", "routing.png", "tensorboard", "samples"):
        assert (whole / name).exists()
    assert "non-causal" in second.stdout  # expert choice looks ahead, and the losses say so


def _stored(checkpoint):
    """Name and checksum of every file of tensors."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, MPIEXEC], ids=["torchrun", "mpiexec"])
def test_other_launchers_agree_with_one_process(launcher, overrides, tmp_path):
    short = [*overrides, "train.stop_after=2"]
    one, two = tmp_path / "one", tmp_path / "two"
    alone = launch(ALONE, [*short, f"run.dir={one}", "parallel.expert=1"])
    assert alone.returncode == 0, alone.stderr
    ranks = launch(launcher, [*short, f"run.dir={two}"])
    assert ranks.returncode == 0, ranks.stderr
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], abs=1e-5)


@pytest.mark.slow
def test_memory_of_the_quickstart_stays_under_three_gib_a_rank(overrides):
    """Batch and model of the shipped recipe. Data, number of steps and vocabulary are smaller: 432 ids and the markers
    for 2,560, so each copy of the logits (4,096 tokens in float32) takes 0.03 GiB less than the recipe's."""
    names = ("data.sequence_length", "data.group_sequences", "data.lanes", "model.", "train.steps")
    own = [override for override in overrides if not override.startswith(names)]
    assert launch(DEEPSPEED, [*own, "train.stop_after=3", "data.lanes=2"]).returncode == 0
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # GiB, of any process so far
    assert 0.3 < largest < 3


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["dense_quickstart", "moe_8x_quickstart"])
def test_the_other_quickstarts_train(recipe, overrides):
    done = launch(DEEPSPEED, [*overrides, "train.stop_after=2"], config=f"configs/{recipe}.yaml")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.stpes=3", "unknown key 'train.stpes' (did you mean 'steps'?)"),
        ("deepspeed.gradient_cliping=0.3", "gradient_cliping"),
        ("model.ffn.router.text={type: expert_choice, num_expert: 4}", "num_expert"),
        ("parallel.expert=2", "parallel.expert=2 does not divide the 1 ranks of this run"),
        ("data.shards=/nowhere", "/nowhere"),
        ("data.text_tokenizer=/nowhere.model", "/nowhere.model"),
        ("run.resume=/nowhere", "run.resume=/nowhere is not a complete checkpoint"),
        ("data.lanes=4", None),
    ],
)
def test_bad_input_alone(override, sentence, overrides):
    result = launch(ALONE, [*overrides, "parallel.expert=1", "train.stop_after=1", override])
    if sentence is None:
        assert result.returncode == 0, result.stderr
    else:
        _failed_with(result, sentence)


@pytest.mark.slow
def test_bad_input_on_ranks(overrides, tmp_path):
    """What one rank meets, all ranks end with: a shard that only rank 1 reads is cut short."""
    seven = [*overrides, "model.ffn.router.text.num_experts=3"]
    _failed_with(launch(TORCHRUN, seven), "parallel.expert=2 does not divide the model's 7 experts")
    shard = sorted((tmp_path / "shards" / "train").glob("*.tar"))[1]
    shard.write_bytes(shard.read_bytes()[:-4096])
    _failed_with(launch(DEEPSPEED, overrides), shard.name)
    _failed_with(launch(TORCHRUN, [*overrides, "parallel.expert=3"]), "parallel.expert=3 does not divide the 2 ranks")


@pytest.mark.slow
def test_a_checkpoint_of_another_model_or_other_tokenizers(overrides, tokenizers, tmp_path):
    model = shutil.copy(tokenizers / "text.model", tmp_path)
    short = [*overrides, "parallel.expert=1", "train.stop_after=1", f"data.text_tokenizer={model}"]
    assert launch(ALONE, short).returncode == 0
    again = [*short, f"run.resume={tmp_path / 'run' / 'checkpoints' / 'step_00000001'}", "train.stop_after=2"]
    _failed_with(launch(ALONE, [*again, "model.num_layers=1"]), "model.num_layers was 2 and is now 1")
    shutil.copy(tokenizers / "other.model", model)
    _failed_with(launch(ALONE, again), "step_00000001 was trained with other tokenizers than text tokenizer")


def _failed_with(result, sentence):
    """A non-zero exit and one sentence, without a traceback."""
    output = result.stdout + result.stderr
    assert result.returncode != 0
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and sentence in errors[0], output
    assert "moe_dist/train.py" not in output  # no traceback of ours (torchrun shows one of its own)
