"""Training on instructions of two corpora, as a user starts it: the domains' experts are measured and drawn."""

import pytest

from moe_dist.data.shards import Sample, write_shards
from moe_dist.telemetry.keys import undeclared
from tests.test_train import TORCHRUN, launch, metrics_of


def write_questions(samples, folder, domain):
    """About the fixtures' pictures, each of its split."""
    write_shards(
        [
            Sample(s.key, s.split, s.png, None, {"prompt": "What is it?", "answer": f" {s.caption}", "domain": domain})
            for s in samples
        ],
        folder,
    )
    return folder


@pytest.mark.slow
def test_two_domains_over_two_ranks(emoji_samples, tokenizers, tmp_path):
    noto, fluent = ([s for s in emoji_samples if s.meta["vendor"] == vendor] for vendor in ("noto", "fluent"))
    folders = [write_questions(noto, tmp_path / "noto", "noto"), write_questions(fluent, tmp_path / "fluent", "fluent")]
    overrides = [
        f"data.shards={[str(folder) for folder in folders]}",
        f"data.text_tokenizer={tokenizers / 'text.model'}",
        f"data.image_tokenizer={tokenizers / 'vq'}",
        *["data.sequence_length=128", "data.group_sequences=2", "data.lanes=4", "data.max_bad_fraction=0.5"],
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
