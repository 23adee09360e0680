"""Failing runs end every rank by itself, with one sentence and without a hang: no launcher ends these ranks."""

from __future__ import annotations

import os
import resource
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from moe_dist.config.recipe import Config, load_config, save_config
from moe_dist.core.errors import UserError
from moe_dist.data.cache.token_cache import build_cache, load_vocabulary
from moe_dist.data.shards.tars import Sample, write_shards
from moe_dist.metrics.run_folder import read_status
from moe_dist.parallel.layout import Layout, make_layout
from moe_dist.parallel.signals import StopSignals
from moe_dist.training.setup import check_recipe, open_data
from tests.support import ROOT
from tests.support.distributed import run_ranks
from tests.support.launching import ALONE, MOMA, TORCHRUN, bare_ranks, launch, launch_tool


def all_failed_with(outcomes: list[tuple[int, str]], sentence: str) -> None:
    """Check that every rank exits with status 2, that only rank 0 prints the reason, and that there is no traceback."""
    everything = "\n".join(f"rank {rank}:\n{output}" for rank, (_, output) in enumerate(outcomes))
    assert [status for status, _ in outcomes] == [2] * len(outcomes), everything
    told = [[line for line in output.splitlines() if line.startswith("error: ")] for _, output in outcomes]
    assert [len(lines) for lines in told] == [1] + [0] * (len(outcomes) - 1), everything
    assert sentence in told[0][0], everything
    assert "Traceback" not in everything, everything


# --- errors in the recipe, found before any data are read (there are none)


def test_a_wrong_key_is_told_before_the_imports_that_take_seconds():
    done = launch([*ALONE, "-X", "importtime"], ["train.stpes=3"])
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 2 and "unknown key 'train.stpes'" in done.stdout + done.stderr
    assert "moe_dist.config.recipe" in imported
    assert not imported & {"deepspeed", "megatron.core"}


@pytest.mark.parametrize(
    ("world", "override", "sentence"),
    [
        (2, "model.ffn.router.text.num_experts=3", "parallel.expert=2 does not divide the model's 7 experts"),
        (
            2,
            "model.ffn={type: moe, hidden_size: 24, slices: 3, router: {type: expert_choice, num_experts: 5}}",
            "parallel.expert=2 does not divide the model's 5 experts times 3 slices",
        ),
        (2, "parallel.expert=3", "parallel.expert=3 does not divide the 2 ranks of this run"),
        (2, "data.lanes=3", "data.lanes=3 is not a multiple of the 2 data-parallel ranks"),
        (2, "data.sequence_length=4", "data.sequence_length=4 is below the minimum of 8"),
        (2, "train.global_batch_groups=6", "train.global_batch_groups=6 is not a multiple of 8"),
        (2, "model.ffn.router.text={type: expert_choice, num_expert: 4}", "num_expert"),
        (2, "model.ffn.experts={type: lora, rank: 4, alpha: 8}", "model.ffn.experts.type=lora needs exactly 1 expert"),
        (2, "deepspeed.gradient_cliping=0.3", "gradient_cliping"),
        (2, "losses={load_balanse: {weight: 0.1}}", "key 'losses.load_balanse'"),
        (2, "trainable=['*.ruoter.*']", "*.ruoter.*"),
    ],
)
def test_a_wrong_recipe(world, override, sentence):
    with pytest.raises(UserError) as caught:
        config = load_config(MOMA, [override])
        check_recipe(config, Layout(world=world, expert=config.parallel.expert))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("device", "bf16", "size", "fits"),
    [
        ("cuda", True, 20, False),
        ("cuda", True, 264, False),
        ("cuda", True, 24, True),
        ("cuda", True, 256, True),
        ("cuda", False, 20, True),
        ("cpu", True, 20, True),
    ],
)
def test_heads_that_flash_attention_refuses(device, bf16, size, fits):
    """FlashAttention limits the head size only where it is used: in bf16 on a GPU."""
    config = load_config(MOMA, [f"model.head_size={size}", f"deepspeed.bf16.enabled={bf16}"])
    layout = Layout(world=2, expert=2, device=torch.device(device))
    with nullcontext() if fits else pytest.raises(UserError, match=f"heads of size {size} .* multiple of 8 up to 256"):
        check_recipe(config, layout)


@pytest.mark.slow
def test_a_wrong_recipe_shows_before_the_data_are_looked_for(tmp_path):
    nowhere = [f"run.dir={tmp_path / 'run'}", "data.shards=/nowhere", "data.text_tokenizer=/nowhere.model"]
    all_failed_with(bare_ranks([*nowhere, "data.lanes=3"]), "data.lanes=3 is not a multiple of the 2")
    status = read_status(tmp_path / "run")
    assert (status["state"], status["restart"]) == ("failed", False) and "data.lanes=3" in status["reason"]


@pytest.mark.slow
def test_what_a_recipe_needs_and_lacks_is_said_with_its_command(tmp_path):
    needs = f"needs=[{{type: corpus, corpus: emoji, out: {tmp_path / 'emoji'}}}]"
    lacking = [f"run.dir={tmp_path / 'run'}", f"data.shards={tmp_path / 'emoji'}", needs]
    command = f"python launch/prepare_data.py corpus=emoji out={tmp_path / 'emoji'}"
    sentence = f"the recipe needs {tmp_path / 'emoji'}, which is missing: `{command}` makes it"
    all_failed_with(bare_ranks(lacking), sentence)


def test_a_recipe_that_is_not_utf8(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes("# caf\u00e9\n".encode("latin-1") + (ROOT / MOMA).read_bytes())
    all_failed_with(bare_ranks([], config=recipe), f"the configuration file {recipe} is not UTF-8 text (byte 5)")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_an_environment_that_is_no_number(name, tmp_path):
    outcomes = bare_ranks([f"run.dir={tmp_path}"], world=1, variables={name: "one"})
    all_failed_with(outcomes, f"the environment sets {name}=one, which is not a non-negative integer")


@pytest.mark.slow
def test_an_evaluation_of_nothing_is_told_before_the_launcher_ends_the_ranks(tmp_path):
    """The launcher ends the other ranks as soon as the first one exits."""
    for folder, sentence in ((tmp_path / "none", "none"), (tmp_path, "holds no complete checkpoint")):
        if folder.exists():
            save_config(load_config(ROOT / MOMA), folder / "config.yaml")
        done = launch_tool(TORCHRUN, "evaluate.py", [str(folder), "parallel.expert=2"])
        assert done.returncode != 0
        told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(told) == 1 and sentence in told[0], done.stderr


# --- errors of the disk


@pytest.mark.slow
def test_a_shard_that_cannot_be_read(overrides, tmp_path):
    """Only rank 1 reads the second shard, which is a folder instead of a file."""
    shard = sorted((tmp_path / "shards" / "train").glob("*.tar"))[1]
    shard.unlink()
    shard.with_name(shard.name + ".index.json").unlink()
    shard.mkdir()
    all_failed_with(bare_ranks(overrides), f"{shard}: Is a directory")


@pytest.mark.slow
def test_a_disk_that_is_full_in_the_middle_of_a_run(overrides, tmp_path):
    """Rank 0 may not write files over 6,000 bytes; metrics.jsonl exceeds this after a few steps."""
    overrides = [*overrides, "checkpoint.every=0", "eval.every=0", "train.steps=100", "telemetry.tensorboard=false"]
    assert launch(ALONE, [*overrides, "train.stop_after=1", "parallel.expert=1"]).returncode == 0  # fills the cache
    limit = 6000
    outcomes = bare_ranks(
        [*overrides, "run.resume=none"],
        prepare_rank_0=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)),
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    all_failed_with(outcomes, f"{metrics} cannot be written: File too large")
    assert metrics.stat().st_size == limit and metrics.read_text().count("\n") >= 2, "some steps were taken before"
    status = read_status(tmp_path / "run")
    assert status["state"] == "failed" and "metrics.jsonl cannot be written" in status["reason"]
    assert status["step"] > 2


# --- errors in the data, on two ranks that several tests share


def _open_data(rank: int, config: Config, cache: str) -> str | None:
    os.environ["XDG_CACHE_HOME"] = cache
    layout = make_layout(expert=1, device=torch.device("cpu"))
    try:
        open_data(config.data, load_vocabulary(config.data), layout, StopSignals())
    except UserError as error:
        return str(error).removesuffix(" (rank 0)").removesuffix(" (rank 1)")
    finally:
        del os.environ["XDG_CACHE_HOME"]
    return None


def _cache_in_the_way(shards: Path) -> None:
    """Make it impossible to write tokens next to the shards or in the user's cache folder."""
    (shards / "train" / "tokens").write_text("a file")
    (shards.parent / "cache").write_text("a file")


def _second_shard_cut(shards: Path) -> None:
    shard = sorted((shards / "train").glob("*.tar"))[1]
    shard.write_bytes(shard.read_bytes()[:-4096])


def _empty_folder(shards: Path) -> None:
    shutil.rmtree(shards)
    shards.mkdir()


def _bad_images(shards: Path) -> None:
    shutil.rmtree(shards)
    broken = [Sample(f"{split}-{i}", split, png=b"no image") for i in range(4) for split in ("train", "validation")]
    write_shards([*broken, Sample("good", "train", caption="x"), Sample("fine", "validation", caption="y")], shards)


def _tokens_of_others(shards: Path) -> None:
    other = load_config(MOMA).data.model_copy(update={"shards": str(shards), "image_tokenizer": None})
    other = other.model_copy(update={"text_tokenizer": str(shards.parent / "other.model")})
    for split in ("train", "validation"):
        build_cache(other, split, load_vocabulary(other))
    for tar in shards.glob("*/*.tar"):
        tar.unlink()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda shards: None, None),
        (_cache_in_the_way, "cannot be written: tried "),
        (_second_shard_cut, "shard-000001.tar is truncated or was replaced: "),
        (_empty_folder, "shards holds no .tar files"),
        (_bad_images, "4 of 5 samples skipped: 4 undecodable image (train-"),
        (_tokens_of_others, "were made with text tokenizer "),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else None,
)
def test_bad_data_on_ranks(spoil, sentence, overrides, tokenizers, tmp_path):
    shutil.copy(tokenizers / "other.model", tmp_path)
    spoil(tmp_path / "shards")
    told = run_ranks(_open_data, 2, load_config(MOMA, overrides), str(tmp_path / "cache"))
    assert told[0] == told[1], "the ranks tell different things"
    assert told[0] is None if sentence is None else sentence in told[0], told[0]


# --- errors of the other commands


TOOLS = [
    "prepare_data.py corpus=emojy out=/nowhere",
    "train_tokenizers.py shards=/nowhere out=/nowhere",
    "prepare_model.py model=smallm out=/nowhere",
    "report.py /nowhere",
    "convert.py upcycle --from /nowhere --to /nowhere --experts 2",
    "evaluate.py /nowhere",
    "experts_by_token.py /nowhere",
    "lm_eval.py /nowhere --tasks emoji",
    "prepare_tasks.py shards=/nowhere out=/nowhere",
    "generate.py /nowhere --caption a",
    "train.py --config /nowhere",
    "align.py collect /nowhere",
    "multiple_choice.py /nowhere",
    "job.py begin --job 1 --restarts 0 --max-failures 1 --config /nowhere",
]


def test_no_tool_is_left_out():
    assert {command.split()[0] for command in TOOLS} == {path.name for path in (ROOT / "launch").glob("*.py")}


@pytest.mark.slow
@pytest.mark.parametrize("command", TOOLS, ids=lambda command: command.split()[0])
def test_every_tool_says_an_error_in_the_same_way(command):
    tool, *arguments = command.split()
    done = launch_tool(ALONE, tool, arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
