"""RoMA from a Hugging Face folder with the released recipe: collect, find neighbours and train a small random OLMoE."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from launch import align
from moe_dist.config.recipe import load_config
from moe_dist.convert.pretrained import open_pretrained
from moe_dist.data.shards.tars import write_shards
from moe_dist.data.stream.neighbour_store import read_samples
from tests.launch.test_roma import (
    collect_on,
    item,
    make_embedder,
    metrics,
    parameters,
    refusal_of_collect,
    train_on,
)
from tests.support import ROOT
from tests.support.distributed import run_ranks
from tests.support.family_models import save_model
from tests.support.task_cases import save_tokenizer

LAYERS = 16  # as many as OLMoE, so that the recipe's `trainable` is left as it is
GATES = {f"layers.{layer}.ffn.router.gate.weight" for layer in range(11, 16)}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Make a folder with bf16 weights, questions, a sentence-embedding model, and a recipe of the folder's sizes."""
    folder = tmp_path_factory.mktemp("roma_pretrained")
    samples = [item(n, split) for split in ("train", "validation") for n in range(48)]
    write_shards(samples, folder / "shards", samples_per_shard=16)
    rows = save_tokenizer(folder / "olmoe", [sample.meta["prompt"] for sample in samples])
    save_model("olmoe", folder / "olmoe", vocab_size=rows, num_hidden_layers=LAYERS, initializer_range=0.1)
    (weights,) = (folder / "olmoe").glob("*.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights)
    make_embedder(folder / "embedder")
    released = ROOT / "configs" / "roma_olmoe_released.yaml"
    model = open_pretrained(folder / "olmoe").model.model_dump(mode="json", exclude_unset=True)
    small = {
        "extends": str(released),
        "init_from": {"checkpoint": str(folder / "olmoe")},
        "data": {
            "shards": str(folder / "shards"),
            "text_tokenizer": str(folder / "olmoe"),
            "neighbours": str(folder / "store"),
            "sequence_length": 256,
            "lanes": 4,
        },
        "model": model,
        "parallel": {"expert": 2},
        "train": {"steps": 2},
        "schedule": {"warmup_steps": 1, "peak_lr": 1e-2, "end_lr": 1e-2},
        "losses": {"manifold": {"weight": {"points": [[0, 0.0], [2, 0.8]]}}},
        "eval": {"every": 0},
        "telemetry": {"tensorboard": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(small))
    run_ranks(collect_on, 2, str(folder / "recipe.yaml"), [])
    align.write_nearest(load_config(folder / "recipe.yaml"), folder / "embedder")
    return folder


def test_one_process_collects_what_two_ranks_with_spread_experts_collect(work):
    other = f"data.neighbours={work / 'alone'}"
    run_ranks(collect_on, 1, str(work / "recipe.yaml"), ["parallel.expert=1", other])
    (two, about), (one, about_one) = read_samples(work / "store"), read_samples(work / "alone")
    assert about["model"] == about_one["model"] and about["checkpoint"] == str(work / "olmoe")
    assert torch.equal(two.sample_N, one.sample_N) and torch.equal(two.right_N, one.right_N)
    assert two.routing_NR.shape == (48, LAYERS * 6)
    torch.testing.assert_close(two.routing_NR, one.routing_NR, rtol=0.02, atol=0.02)  # bf16


def test_the_term_moves_the_chosen_gates_and_every_other_parameter_keeps_its_bits(work):
    """The term has weight 0 in the control. In the first two steps, the recipe's warm-up reaches 0 and 0.4."""
    runs = {"roma": [], "control": ["losses.manifold.weight=0"]}
    for name, overrides in runs.items():
        overrides = [f"run.dir={work / name}", *overrides]
        assert run_ranks(train_on, 2, str(work / "recipe.yaml"), overrides) == ["", ""]
    start = {name: lazy.read().float() for name, lazy in open_pretrained(work / "olmoe").tensors.items()}
    roma, control = (parameters(work / name) for name in runs)
    assert roma.keys() == start.keys()
    for trained in (roma, control):
        assert {name for name in start if not torch.equal(start[name], trained[name])} == GATES
    assert all(not torch.equal(roma[name], control[name]) for name in GATES), "the term has no gradient at a router"
    first, second, *_ = metrics(work / "roma")
    assert first["manifold/coverage"] == 1.0 and first["loss/manifold"] > 1e-4
    assert second["loss"] == metrics(work / "control")[1]["loss"], "the first step has weight 0"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["data.text_tokenizer={work}/embedder"], "was trained with another tokenizer than"),
        (["model.num_layers=4"], "model.num_layers is 4, but must be 16"),
    ],
)
def test_another_model_is_refused(change, sentence, work):
    overrides = [text.format(work=work) for text in change]
    answers = run_ranks(refusal_of_collect, 2, str(work / "recipe.yaml"), overrides)
    assert all(answer.startswith("UserError") and sentence in answer for answer in answers), answers


def test_a_store_of_other_weights_is_refused(work, tmp_path):
    for path in (work / "olmoe").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (weights,) = tmp_path.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["model.layers.3.mlp.gate.weight"][0, 0] += 1
    save_file(tensors, weights)
    overrides = [f"init_from.checkpoint={tmp_path}", f"run.dir={tmp_path / 'run'}"]
    answers = run_ranks(train_on, 2, str(work / "recipe.yaml"), overrides)
    assert all("was collected with another model" in answer for answer in answers), answers
