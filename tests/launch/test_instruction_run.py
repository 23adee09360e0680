"""Training on instructions of two corpora as a user starts it: each domain's use of experts is measured and plotted."""

import json

import pytest

from moe_dist.data.shards.tars import Sample, write_shards
from moe_dist.metrics.metric_keys import undeclared
from tests.launch.test_train import metrics_of
from tests.support.launching import ALONE, TORCHRUN, launch


def write_questions(samples, folder, domain):
    """Write questions about the fixtures' pictures, each in its split."""
    write_shards(
        [
            Sample(s.key, s.split, s.png, None, {"prompt": "What is it?", "answer": f" {s.caption}", "domain": domain})
            for s in samples
        ],
        folder,
    )
    return folder


def write_two_domains(samples, tmp_path):
    """Write two domains. Returns overrides that name them and make any quickstart small."""
    noto, fluent = ([s for s in samples if s.meta["vendor"] == vendor] for vendor in ("noto", "fluent"))
    folders = [write_questions(noto, tmp_path / "noto", "noto"), write_questions(fluent, tmp_path / "fluent", "fluent")]
    return [f"data.shards={[str(folder) for folder in folders]}", "data.max_bad_fraction=0.5"]


@pytest.mark.slow
def test_two_domains_over_two_ranks(emoji_samples, tokenizers, tmp_path):
    overrides = [
        *write_two_domains(emoji_samples, tmp_path),
        f"data.text_tokenizer={tokenizers / 'text.model'}",
        f"data.image_tokenizer={tokenizers / 'vq'}",
        *["data.sequence_length=128", "data.group_sequences=2", "data.lanes=4"],
        *["model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.ffn.hidden_size=32"],
        *["train.steps=2", "schedule.warmup_steps=1", "eval.every=2", "eval.groups=2"],
    ]
    run = tmp_path / "run"
    done = launch(TORCHRUN, [*overrides, f"run.dir={run}"], config="configs/moe_8x_quickstart.yaml")
    assert done.returncode == 0, done.stderr
    last = metrics_of(run)[-1]
    for domain in ("noto", "fluent"):
        shares = last[f"moe/1/domain_share/{domain}"]
        assert sum(shares) == pytest.approx(1) and len(shares) == 8
        assert last[f"eval/loss/domain/{domain}"] > 0
    assert last["moe/1/domain_share/noto"] != last["moe/1/domain_share/fluent"]
    assert "loss/text" in last and "loss/image" not in last, "answers are learnt, pictures are not"
    assert undeclared(last) == [] and (run / "domains.png").exists()


@pytest.mark.slow
def test_llava_mole_and_its_control_start_from_the_dense_quickstart(emoji_samples, overrides, tmp_path):
    """Small versions of the shipped recipes: the tensors they load, the parameters they train, their metrics."""
    dense = [*overrides, f"run.dir={tmp_path / 'dense'}", "train.stop_after=1"]
    assert launch(ALONE, dense, config="configs/dense_quickstart.yaml").returncode == 0
    questions = [*write_two_domains(emoji_samples, tmp_path), f"init_from.checkpoint={tmp_path / 'dense'}"]
    metrics = {}
    for recipe, launcher in (("llava_mole_quickstart", TORCHRUN), ("llava_lora_quickstart", ALONE)):
        run = tmp_path / recipe
        own = [*overrides, *questions, f"run.dir={run}", "train.stop_after=2"]
        done = launch(launcher, own, config=f"configs/{recipe}.yaml")
        assert done.returncode == 0, done.stderr
        account = json.loads((run / "init_from.json").read_text())
        assert account["left_out"]["tensors"] == 0 and account["loaded"]["tensors"] > 10
        assert all(".lora." in e["name"] or ".router." in e["name"] for e in account["new"]["entries"])
        metrics[recipe] = metrics_of(run)
    mole, lora = (lines[0] for lines in metrics.values())
    assert mole["loss"] == pytest.approx(lora["loss"], abs=1e-5), "B is zero: both begin as the dense model"
    assert 0.25 <= mole["loss/pooled_balance"] <= 1 and "loss/pooled_balance" not in lora
    assert all(len(mole[f"moe/1/domain_share/{domain}"]) == 4 for domain in ("noto", "fluent"))
    assert undeclared(mole) == undeclared(lora) == []
