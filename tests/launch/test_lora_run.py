"""LoRA as a user trains it: a Mixtral in, deltas of its experts trained on two ranks, and out again."""

import json

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from launch import convert
from moe_dist.checkpoint.manifest import newest_complete
from moe_dist.data.shards.tars import Sample, split_of, write_shards
from tests.convert.test_export import save_mixtral
from tests.data.tokenizers.test_hugging_face_text import save as save_tokenizer
from tests.launch.test_convert import train
from tests.support.hugging_face_models import load_checkpoint, logits_apart, logits_packed, random_documents

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": ["experts.*", "attention.q", "router"]}


@pytest.fixture
def recipe(emoji_samples, tmp_path):
    """A recipe that starts from a random Mixtral's folder and trains LoRA on a few captions."""
    save_mixtral(tmp_path / "hf", vocab_size=300, initializer_range=0.1)
    save_tokenizer(tmp_path / "hf", bos_token="<|start|>", eos_token="<|end|>")
    texts = enumerate(sample.caption for sample in emoji_samples * 2)
    samples = [Sample(f"text-{number}", split_of(f"text-{number}"), caption=text) for number, text in texts]
    write_shards(samples, tmp_path / "shards")
    convert.main(["model", "--from", str(tmp_path / "hf"), "--to", str(tmp_path / "model.yaml")])
    model = yaml.safe_load((tmp_path / "model.yaml").read_text())["model"]
    data = {"sequence_length": 64, "group_sequences": 2, "lanes": 4, "text_tokenizer": str(tmp_path / "hf")}
    return {
        "data": data | {"shards": str(tmp_path / "shards")},
        "model": model | {"lora": LORA},
        "init_from": {"checkpoint": str(tmp_path / "hf"), "new": ["*.lora.*"]},
        "parallel": {"expert": 2},
        "train": {"steps": 6, "global_batch_groups": 4, "reach_steps": 4},
        "deepspeed": {"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}},
        "schedule": {"peak_lr": 0.02},
        "eval": {"every": 0},
    }


def test_a_mixtral_is_tuned_on_two_ranks_and_leaves_merged_and_as_an_adapter(recipe, tmp_path):
    lines, said, status = train(recipe, out=tmp_path / "run", ranks=2)
    assert status == 0, said
    own = 3 * (4 * 4 * (48 + 80) * 3 + 4 * (48 + 48) + 4 * (48 + 4))  # of 3 layers: 4 experts, q, router
    assert f"trains {own:,} of " in said
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.05
    reached = json.loads((tmp_path / "run" / "reached.json").read_text())
    assert reached["never"] == [] and reached["steps"] == 4
    assert reached["reached"] + len(reached["not_tried"]) == 3 * 2 * (3 * 4 + 1 + 1)

    out = str(tmp_path / "run")
    convert.main(["export", "--from", out, "--to", str(tmp_path / "merged")])
    convert.main(["export", "--adapters", "--from", out, "--to", str(tmp_path / "adapter")])
    documents = random_documents(300)
    checkpoint = newest_complete(tmp_path / "run")
    expected = logits_packed(load_checkpoint(checkpoint).eval(), documents)
    base, merged = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("hf", "merged"))
    assert (logits_apart(base, documents) - expected).abs().max() > 0.02, "it has learned"
    torch.testing.assert_close(logits_apart(merged, documents), expected, rtol=0, atol=1e-4)
    peft = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_apart(peft, documents), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_router_that_cannot_learn_ends_the_run_by_name(recipe, tmp_path):
    """Mixtral renormalises its weights: with one expert per token they are 1, and no gradient reaches the router."""
    recipe["model"]["ffn"]["router"]["top_k"] = 1
    recipe["init_from"] = None
    lines, said, status = train(recipe | {"parallel": {"expert": 1}}, out=tmp_path / "run")
    assert status != 0 and len(lines) == 3
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: no gradient reached 'layers.0.ffn.router.gate.lora.a', 'layers.0.ffn.router.gate.lora.b', "
        "'layers.1.ffn.router.gate.lora.a' and 3 more in 4 steps, so the run would not train them: freeze with "
        "`trainable` what shall not be trained, or change train.reach_steps (0: no check)"
    ]
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
