"""`make train` on machines with and without GPUs, and what it and the Slurm scripts set for every rank."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_dist.config.recipe import load_config
from moe_dist.data.stream.loader import check_data
from moe_dist.model.attention import check_head_size
from moe_dist.parallel.layout import check_layout
from moe_dist.training.deepspeed_config import accumulation_steps
from moe_dist.training.fit import fit
from tests.support import ROOT
from tests.support.launching import BIN

BF16 = " deepspeed.bf16.enabled=true"
OURS = ("MAKE", "MFLAGS", "RANKS", "PYTORCH_", "SLURM", "SITE", "START")  # of `make test`, or of a user
SLURM = {"SLURM_NNODES": "1", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n1"}


def program(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def run(command, folder, variables):
    own = (*OURS, "CUDA_VISIBLE_DEVICES")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    path = f"{folder}:{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=ROOT, env=inherited | {"PATH": path} | variables, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def train(folder, *arguments, gpus=0, show='echo "$@"', **variables):
    """What `show` prints in the place of DeepSpeed's launcher, on a machine with these GPUs."""
    listed = "\n".join(f"GPU {number}: NVIDIA H100 (UUID: GPU-{number})\n  MIG 1g.10gb" for number in range(gpus))
    program(folder, "nvidia-smi", f"echo '{listed}'" if gpus else "echo 'NVIDIA-SMI has failed'; exit 9")
    program(folder, "deepspeed", show)
    # The Makefile puts CURDIR/BIN first on PATH: with an absolute BIN no such folder exists, and the stand-in is found.
    command = ["make", "--silent", "-o", "data", "train", f"BIN={BIN}", f"PYTHON={sys.executable}", *arguments]
    return run(command, folder, variables)[-1]


@pytest.mark.parametrize(
    ("gpus", "arguments", "ranks", "override"),
    [
        (0, (), 2, ""),
        (0, ("RANKS=3",), 3, " parallel.expert=1"),
        (1, (), 1, " parallel.expert=1" + BF16),
        (2, (), 2, BF16),
        (3, (), 2, BF16),  # three divide neither lanes nor batch
        (4, (), 4, " train.micro_batch_groups=2" + BF16),
        (8, (), 8, " train.micro_batch_groups=1" + BF16),
        (8, ("RANKS=4",), 4, " train.micro_batch_groups=2" + BF16),
        (4, ("CONFIG=configs/moma_90m.yaml",), 4, " parallel.expert=4"),  # it says bf16 itself
        (6, ("CONFIG=configs/moma_90m.yaml",), 4, " parallel.expert=4"),
        (1, ("CONFIG=configs/dense_quickstart.yaml",), 1, BF16),
    ],
)
def test_a_rank_for_each_gpu(gpus, arguments, ranks, override, tmp_path):
    config = next((a.removeprefix("CONFIG=") for a in arguments if "CONFIG" in a), "configs/moma_quickstart.yaml")
    started = train(tmp_path, *arguments, gpus=gpus)
    assert started == f"--num_gpus {ranks} launch/train.py --config {config}{override}"
    if "RANKS=3" not in arguments:  # which no recipe takes
        assert_accepted(config, override.split(), ranks)


def assert_accepted(config, overrides, ranks):
    recipe = load_config(ROOT / config, overrides)
    check_layout(world=ranks, expert=recipe.parallel.expert)
    check_data(recipe.data, dp=ranks)
    assert accumulation_steps(recipe.train, ranks) >= 1


@pytest.mark.parametrize("gpus", range(1, 17))
@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_every_recipe_takes_the_ranks_it_is_given(config, gpus):
    ranks, overrides = fit(load_config(ROOT / "configs" / config), gpus=gpus)
    assert 1 <= ranks <= gpus and (ranks == gpus or gpus not in (1, 2, 4, 8))
    assert_accepted(f"configs/{config}", overrides, ranks)


@pytest.mark.parametrize(
    ("visible", "placement"),
    [("3", "--include localhost:3"), ("5,2", "--include localhost:5,2"), ("1,2,3", "--include localhost:1,2")],
)
def test_only_visible_gpus_are_used(visible, placement, tmp_path):
    assert train(tmp_path, gpus=8, CUDA_VISIBLE_DEVICES=visible).startswith(f"{placement} launch/train.py")


def test_what_is_missing_is_made_first_and_in_order(tmp_path):
    """The stand-ins of python and make say what they are told, and make nothing."""
    stage = tmp_path / "stage.yaml"
    stage.write_text(f"extends: {ROOT}/configs/moma_quickstart.yaml\nrun: {{dir: {tmp_path}/stage}}\n")
    recipe = tmp_path / "own.yaml"
    needs = f"{{type: corpus, corpus: emoji, out: {tmp_path}/emoji}}, {{type: run, recipe: {stage}}}"
    recipe.write_text(f"extends: {ROOT}/configs/dense_quickstart.yaml\nneeds: [{needs}]\n")
    for name in ("python", "deepspeed"):
        program(tmp_path, name, f'echo {name} "$@"')
    program(tmp_path, "nvidia-smi", "exit 9")
    make = shutil.which("make")
    program(tmp_path, "make", 'echo make "$@"')
    command = [make, "--silent", "-o", "setup", "train", f"BIN={BIN}", f"CONFIG={recipe}", "ARGS=seed=3"]
    assert run(command, tmp_path, {}) == [
        f"python launch/prepare_data.py corpus=emoji out={tmp_path}/emoji",
        f"make train CONFIG={stage} ARGS=",
        f"deepspeed --num_gpus 2 launch/train.py --config {recipe} seed=3",
    ]


def test_overrides_come_last(tmp_path):
    arguments = "seed=1 deepspeed.bf16.enabled=false"
    assert train(tmp_path, f"ARGS={arguments}", gpus=1).endswith(f"parallel.expert=1{BF16} {arguments}")


@pytest.mark.parametrize("enabled", ["true", "false"])
def test_a_recipe_that_says_bf16_is_left_as_it_is(enabled, tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text(f"extends: {ROOT}/configs/moma_quickstart.yaml\ndeepspeed:\n  bf16: {{enabled: {enabled}}}\n")
    started = train(tmp_path, f"CONFIG={recipe}", gpus=2)
    assert started == f"--num_gpus 2 launch/train.py --config {recipe}"


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_heads_of_every_recipe_fit_flash_attention(recipe):
    """As `make train` uses it on GPUs."""
    model = load_config(recipe).model
    size = model.head_size or model.hidden_size // model.num_heads
    check_head_size(size, device=torch.device("cuda"), dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("variables", "setting"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, "expandable_segments:False"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
    ],
    ids=["default", "own", "own by the old name"],
)
def test_gpu_memory_grows_in_segments_unless_the_user_says_otherwise(variables, setting, tmp_path):
    show = 'echo "$PYTORCH_ALLOC_CONF"'
    assert train(tmp_path, show=show, **variables) == setting
    program(tmp_path, "scontrol", "echo n1")
    script = f"SITE=none; source slurm/env.sh; {show}"
    assert run(["bash", "-c", script], tmp_path, {**SLURM, **variables}) == [setting]
