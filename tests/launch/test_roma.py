"""Small version of RoMA's pipeline on two ranks: tune, collect, find neighbours, tune the routers, compare."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from transformers import BertConfig, BertModel, BertTokenizerFast

from launch import align, multiple_choice
from moe_dist.checkpoint.checkpoint import newest_complete
from moe_dist.checkpoint.stored_weights import read_tensors
from moe_dist.config.recipe import load_config
from moe_dist.core.errors import UserError
from moe_dist.data.shards.tars import Sample, write_shards
from moe_dist.data.stream.neighbour_store import read_samples
from moe_dist.data.tokenizers.text_tokenizer import train_text_tokenizer
from moe_dist.evaluate.choice_accuracy import Answers, Result
from moe_dist.metrics.metric_keys import undeclared
from moe_dist.training.run import train
from tests.support import ROOT
from tests.support.distributed import run_ranks

WORDS = ("apple", "bread", "chair", "dance", "eagle", "fruit", "grass", "horse", "island", "juice", "knife", "lemon")
ROUTERS = "layers.1.ffn.router.*"


def item(number: int, split: str) -> Sample:
    """Make an item that asks which option is a given word, so that a small model answers some items correctly."""
    draw = random.Random(f"{split} {number}")
    options = draw.sample(WORDS, 4)
    correct = draw.randrange(4)
    listed = " ".join(f"{letter}) {option}" for letter, option in zip("ABCD", options))
    question = f"{number}: which one is {options[correct]}?"
    meta = {
        "prompt": f"{question} {listed} Answer:",
        "answer": f" {'ABCD'[correct]}",
        "question": question,
        "domain": ("even", "odd")[number % 2],
        "options": options,
        "correct": correct,
    }
    return Sample(key=f"{split}-{number}", split=split, meta=meta)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Make items, a tokenizer, a tiny sentence-embedding model, a recipe, and a tuned run with its store."""
    folder = tmp_path_factory.mktemp("roma")
    samples = [item(n, "train") for n in range(60)] + [item(n, "validation") for n in range(40)]
    write_shards(samples, folder / "shards", samples_per_shard=16)
    texts = [text for sample in samples for text in (sample.meta["prompt"], sample.meta["answer"])]
    train_text_tokenizer(texts, folder / "text.model", vocab_size=360)
    make_embedder(folder / "embedder")
    recipe = {
        "run": {"dir": str(folder / "tuned")},
        "data": {
            "shards": str(folder / "shards"),
            "text_tokenizer": str(folder / "text.model"),
            "sequence_length": 128,
            "group_sequences": 1,
            "lanes": 4,
        },
        "model": {
            "hidden_size": 32,
            "num_layers": 3,
            "num_heads": 2,
            "norm": "pre",
            "init_std": 0.1,
            "ffn": {"type": "moe", "hidden_size": 32, "router": {"type": "top_k", "num_experts": 4, "top_k": 2}},
        },
        "parallel": {"expert": 2},
        "train": {"steps": 12, "global_batch_groups": 4},
        "schedule": {"peak_lr": 0.01},
        "deepspeed": {"optimizer": {"type": "AdamW"}},
        "eval": {"every": 0},
        "telemetry": {"tensorboard": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run_ranks(train_on, 2, str(folder / "recipe.yaml"), [])
    run_ranks(collect_on, 2, str(folder / "recipe.yaml"), aligned(folder, "roma"))
    align.write_nearest(load_config(folder / "recipe.yaml", aligned(folder, "roma")), folder / "embedder")
    return folder


def make_embedder(folder: Path) -> None:
    """Save a BERT with random weights; texts that share words still get similar embeddings."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters, *(f"##{c}" for c in letters)]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder)


def train_on(rank: int, recipe: str, overrides: list[str]) -> str:
    """Train a recipe. Returns the name and message of an exception, or nothing."""
    try:
        train(load_config(recipe, overrides))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def collect_on(rank: int, recipe: str, overrides: list[str]) -> None:
    align.collect(load_config(recipe, overrides))


def refusal_of_collect(rank: int, recipe: str, overrides: list[str]) -> str:
    """Collect. Returns the name and message of an exception, or nothing."""
    try:
        collect_on(rank, recipe, overrides)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def compare_on(rank: int, arguments: list[str]) -> None:
    multiple_choice.run(arguments)


def aligned(work: Path, name: str, *more: str) -> list[str]:
    return [
        f"run.dir={work / name}",
        f"init_from={work / 'tuned'}",
        f"trainable=['{ROUTERS}']",
        f"data.neighbours={work / 'store'}",
        "losses={manifold: {weight: 500.0, last_layers: 2}}",
        *more,
    ]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_routers_alone_move_towards_their_neighbours(work):
    samples, about = read_samples(work / "store")
    assert len(samples.sample_N) == 60 and 0 < about["right"] < 60
    assert samples.routing_NR.shape == (60, 3 * 4)
    for name, weight in (("roma", 500.0), ("control", 0.0)):
        overrides = aligned(work, name, f"losses.manifold.weight={weight}")
        assert run_ranks(train_on, 2, str(work / "recipe.yaml"), overrides) == ["", ""]
    roma, control = metrics(work / "roma"), metrics(work / "control")
    assert roma[0]["loss/manifold"] == pytest.approx(control[0]["loss/manifold"])
    assert roma[-1]["loss/manifold"] < 0.7 * control[-1]["loss/manifold"]
    assert roma[0]["manifold/coverage"] == 1.0 and not undeclared(roma[0])

    tuned, after = (parameters(work / name) for name in ("tuned", "roma"))
    changed = {name for name in after if not torch.equal(tuned[name], after[name])}
    assert changed == {"layers.1.ffn.router.gate.weight"}, "frozen parameters must stay bit for bit"


def parameters(run: Path) -> dict[str, torch.Tensor]:
    return {name: lazy.read().float() for name, lazy in read_tensors(newest_complete(run)).items()}


@pytest.mark.slow
def test_runs_are_compared_and_answers_kept(work, capfd):
    run_ranks(train_on, 2, str(work / "recipe.yaml"), [f"run.dir={work / 'longer'}", "train.steps=14"])
    arguments = [str(work / "tuned"), str(work / "longer"), "--out", str(work / "comparison.json")]
    run_ranks(compare_on, 2, [*arguments, "parallel.expert=2"])
    first = json.loads((work / "comparison.json").read_text())
    (pair,) = first["comparisons"]
    for name in ("tuned", "longer"):
        accuracy = first["accuracy"][str(work / name)]
        assert [accuracy[task]["items"] for task in ("even", "odd", "overall")] == [20, 20, 40]
    difference = [first["accuracy"][pair[side]]["overall"]["share"] for side in ("second", "first")]
    assert pair["overall"]["difference"] == pytest.approx(difference[0] - difference[1])
    kept = (work / "tuned" / "multiple_choice.json").stat().st_mtime_ns
    run_ranks(compare_on, 1, [*arguments, "parallel.expert=2"])
    assert (work / "tuned" / "multiple_choice.json").stat().st_mtime_ns == kept, "answered twice"
    assert json.loads((work / "comparison.json").read_text()) == first
    run_ranks(compare_on, 1, arguments)  # another layout changes the recipe's keys but not the answers
    assert json.loads((work / "comparison.json").read_text()) == first


@pytest.mark.slow
def test_a_store_that_does_not_fit_is_refused(work, tmp_path):
    recipe = str(work / "recipe.yaml")
    run_ranks(train_on, 2, recipe, [f"run.dir={tmp_path / 'other'}", "seed=1", "train.steps=1"])
    for overrides, message in (
        ([f"init_from={tmp_path / 'other'}"], "was collected with another model"),
        (["init_from=null"], "data.neighbours needs init_from"),
        ([f"data.neighbours={tmp_path}"], "store.json is missing"),
        (["data.neighbours=null"], "losses.manifold needs the neighbours of every sample: set data.neighbours"),
        (
            ["losses.manifold.neighbours={k: 5}"],
            "were found with k=3, not with losses.manifold.neighbours of the recipe",
        ),
        (["losses.manifold.last_layers=4"], "losses.manifold.last_layers=4, the model has 3 expert layers"),
        ([f"data.shards={more_items(tmp_path)}"], "lacks"),
    ):
        answers = run_ranks(train_on, 2, recipe, aligned(work, "refused", f"run.dir={tmp_path / 'run'}", *overrides))
        assert all(answer.startswith("UserError") and message in answer for answer in answers), answers


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("init_from={folder}", "init_from.checkpoint={folder} is neither a complete checkpoint nor a run folder with"),
        ("init_from=null", "the recipe has no init_from, so there is no model to open"),
        ("data.neighbours=null", "the recipe has no data.neighbours, the folder of the neighbour store"),
    ],
)
def test_what_collect_needs_is_said_before_its_data_are_read(override, sentence, tmp_path):
    recipe = ROOT / "configs" / "roma_quickstart.yaml"
    overrides = ["data.shards=/nowhere", override.format(folder=tmp_path)]
    (answer,) = run_ranks(refusal_of_collect, 1, str(recipe), overrides)
    assert answer.startswith("UserError") and sentence.format(folder=tmp_path) in answer


def test_neighbours_need_the_term_and_a_store(tmp_path):
    recipe, store = ROOT / "configs" / "roma_quickstart.yaml", f"data.neighbours={tmp_path}"
    with pytest.raises(UserError, match=r"store\.json is missing"):
        align.write_nearest(load_config(recipe, [store]), tmp_path)
    with pytest.raises(UserError, match=r"the recipe has no losses\.manifold"):
        align.write_nearest(load_config(recipe, [store, "losses={}"]), tmp_path)


def test_a_task_without_a_correct_answer_is_warned_of(capsys):
    log_probs_NO = torch.tensor([[0.0, -1.0], [-1.0, 0.0], [-1.0, 0.0]])
    answers = Answers(
        sample_N=torch.arange(3),
        domain_N=torch.tensor([0, 0, 1]),
        correct_N=torch.tensor([0, 1, 0]),
        log_probs_NO=log_probs_NO,
        routing_NR=torch.zeros(3, 4),
    )
    align.warn(answers, ("easy", "hard"))
    sentence = "none of the 1 samples of the task 'hard' is answered correctly: their neighbours come from other tasks"
    assert capsys.readouterr().err == f"warning: {sentence}\n"


def test_runs_that_cannot_be_compared_are_said():
    with pytest.raises(UserError, match=r"no run folder is named: launch/multiple_choice\.py RUN"):
        multiple_choice.run(["data.validation_shards=/nowhere"])
    one, other = Result({"even": {2: True}}), Result({"odd": {1: True}})
    with pytest.raises(UserError, match="one answered 1, the other 0, 0 in common"):
        multiple_choice.compare({"one": one, "other": other})


def more_items(tmp_path: Path) -> Path:
    samples = [item(n, split) for split in ("train", "validation") for n in range(200, 230)]
    write_shards(samples, tmp_path / "shards", samples_per_shard=16)
    return tmp_path / "shards"
