"""A parameter that no gradient reaches ends the run by name; what had no token to learn from is listed."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from moe_dist.config.recipe import load_config
from moe_dist.core.errors import UserError
from moe_dist.metrics.run_folder import RunFolder
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout, make_layout
from moe_dist.training.deepspeed import init_distributed, make_engine
from moe_dist.training.reach import Reach
from moe_dist.training.trainable import num_trained
from tests.support import ROOT
from tests.support.distributed import run_ranks
from tests.support.toy_model import MOMA, TOP_K, VOCABULARY, make_batch, make_config, objective, sgd
from tests.training.test_lora_training import everywhere

TEXT, BOTH = [3, 7], [0, 1, 2, 4, 5, 6]  # selection groups of one rank: without pictures, with pictures


def config_of(router, stage=1, expert=2, **more):
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    return make_config(
        router=router, expert=expert, groups=4, micro=2, deepspeed=sgd() | {"zero_optimization": zero}, **more
    )


class WithUnused(Transformer):
    """A model with two parameters that its output does not depend on."""

    def __init__(self, config, layout):
        super().__init__(config.model, VOCABULARY, layout, seed=3)
        self.spare, self.zeroed = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def forward(self, tokens_T, info):
        output = super().forward(tokens_T, info)
        output.logits_TV.add_(0 * self.zeroed.sum())
        return output


def watch(rank, config, folder, steps, groups, rates, kind):
    """Train, one step for each rate, and return what the ranks say at the end."""
    layout = make_layout(expert=config.parallel.expert, device=init_distributed())
    model = WithUnused(config, layout) if kind == "unused" else Transformer(config.model, VOCABULARY, layout, seed=3)
    if kind == "lonely":  # no token ever chooses expert 3
        for layer in model.layers:
            layer.ffn.router.gate.bias.data[3] = -1e4
    engine = make_engine(model, config, layout)
    reach = Reach(engine.module, layout, steps)
    try:
        for rate in rates:
            engine.train_step([make_batch(groups)], objective, rate)
            reach.after_step(rate, RunFolder(folder), skipped=False)
    except UserError as error:
        return str(error), num_trained(engine.module, layout.expert)
    return None, num_trained(engine.module, layout.expert)


def outcome(config, folder, *, steps=2, groups=BOTH, rates=(0.1, 0.1), kind=""):
    """Return the sentence that both ranks end with, and the content of reached.json (None: not written)."""
    (said, trained), (others, _) = run_ranks(watch, 2, config, folder, steps, groups, rates, kind)
    assert said == others, "the ranks agree"
    written = json.loads((folder / "reached.json").read_text()) if (folder / "reached.json").exists() else None
    return said, written, trained


@pytest.mark.parametrize(("stage", "expert"), [(1, 2), (3, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_lora_is_reached_in_two_steps(stage, expert, tmp_path):
    """A of every delta has a gradient in the second step, when B has moved; every expert counts by itself."""
    config = everywhere(world=2, expert=expert, accumulation=1, stage=stage)
    said, written, trained = outcome(config, tmp_path)
    assert said is None and not written["never"] and not written["not_tried"]
    assert written["reached"] == 2 * (2 * 4 + 3 + 3 * 4 + 3 + 1) and written["steps"] == 2
    with torch.device("meta"):
        model = Transformer(config.model, VOCABULARY, Layout(), seed=3)
    assert trained == sum(p.numel() for name, p in model.named_parameters() if ".lora." in name)


def test_one_step_or_steps_at_rate_zero_do_not_move_b(tmp_path):
    """In one step, A is never reached. A stacked A had one step with tokens, which is not enough to tell."""
    config = everywhere(world=2, expert=2, accumulation=1)
    said, written, _ = outcome(config, tmp_path, steps=1, rates=(0.1,))
    assert said.startswith("no gradient reached 'layers.0.attention.core.linear_proj.lora.o.a', ")
    assert " in 1 steps, so the run would not train them: freeze with `trainable`" in said
    assert written["never"] == [name for name in written["never"] if name.endswith(".a")] != []
    assert "layers.1.ffn.experts.lora.down.a[3]" in written["not_tried"]
    (tmp_path / "reached.json").unlink()
    assert outcome(config, tmp_path, rates=(0.0, 0.0, 0.1))[:2] == (None, None), "one of two steps counts"


def test_an_unused_parameter_ends_the_run_by_name(tmp_path):
    said, written, _ = outcome(config_of(TOP_K), tmp_path, kind="unused")
    assert said.startswith("no gradient reached 'spare', 'zeroed' in 2 steps, so the run would not train them:")
    assert written["never"] == ["spare", "zeroed"]


def test_an_expert_and_a_modality_without_tokens_are_listed(tmp_path):
    router = TOP_K | {"bias": True}
    said, written, _ = outcome(config_of(router, stage=3, trainable=("*.experts.*",)), tmp_path, kind="lonely")
    of_experts = [f"layers.{layer}.ffn.experts.{name}[3]" for layer in (0, 1) for name in ("gate_up", "down")]
    assert said is None and written["not_tried"] == of_experts

    said, written, _ = outcome(config_of(MOMA), tmp_path, groups=TEXT)
    gates = [f"layers.{layer}.ffn.router.image.gate.weight" for layer in (0, 1)]
    of_images = [f"layers.{n}.ffn.experts.{name}[{e}]" for n in (0, 1) for name in ("gate_up", "down") for e in (2, 3)]
    assert said is None and set(written["not_tried"]) == {*gates, *of_images}


def test_a_router_whose_weights_are_always_one_is_found(tmp_path):
    """Renormalised over one expert, the weight is 1, without a gradient. One expert alone leaves nothing to choose."""
    said, _, _ = outcome(config_of(TOP_K | {"top_k": 1, "renormalize": True}), tmp_path)
    assert said.startswith(
        "no gradient reached 'layers.0.ffn.router.gate.weight', 'layers.1.ffn.router.gate.weight' in"
    )
    one = TOP_K | {"num_experts": 1, "top_k": 1}
    said, written, _ = outcome(config_of(one, expert=1), tmp_path)
    assert said is None and written["not_tried"] == [f"layers.{n}.ffn.router.gate.weight" for n in (0, 1)]


def test_trainable_is_the_deltas_alone_if_the_model_has_lora():
    recipe = ROOT / "configs" / "dense_quickstart.yaml"
    lora = "model.lora={rank: 4, alpha: 8, targets: [ffn.*]}"
    assert load_config(recipe).trainable == ("*",)
    assert load_config(recipe, [lora]).trainable == ("*.lora.*",)
    assert load_config(recipe, [lora, "trainable=['*']"]).trainable == ("*",)
