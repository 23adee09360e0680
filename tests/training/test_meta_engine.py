"""An engine whose model was built on the meta device trains as one whose model was built with all its values."""

from contextlib import nullcontext

import pytest
import torch

from moe_dist.core.initial_values import none_new
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import make_layout
from moe_dist.training.deepspeed import init_distributed, make_engine
from tests.support.distributed import run_ranks
from tests.support.toy_model import TOP_K, VOCABULARY, make_config, objective
from tests.support.trajectory import full_masters, step_inputs

# ZeRO stage, ranks that share the experts, bf16, trainable parameters
LAYOUTS = [
    (1, 2, False, ("*",)),
    (2, 1, True, ("*",)),
    (3, 1, False, ("*",)),
    (3, 2, True, ("*",)),
    (3, 2, False, ("*.router.*", "embedding.*")),
]


def config_of(stage, expert, bf16, trainable):
    section = {
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.3}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100},
        "bf16": {"enabled": bf16},
    }
    return make_config(router=TOP_K, expert=expert, trainable=trainable, deepspeed=section)


def train(rank, config, meta, is_new=None):
    """Take two steps. Return the float32 weights before and after them, the losses and the gradient norms."""
    layout = make_layout(expert=config.parallel.expert, device=init_distributed())
    with torch.device("meta") if meta else nullcontext():
        model = Transformer(config.model, VOCABULARY, layout, seed=3)
    engine = make_engine(model, config, layout, *([is_new] if is_new else []))
    start = {name: value.clone() for name, value in full_masters(engine).items()}
    steps = [engine.train_step(step_inputs(step, layout, config), objective, 0.1) for step in range(2 * (not is_new))]
    return start, full_masters(engine), [(step.loss_sums["loss"], step.grad_norm) for step in steps]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_bit_is_the_same(layout):
    """Weight decay depends on the parameters' shapes, which are lost once ZeRO-3 has sharded them."""
    config = config_of(*layout)
    real, meta = (run_ranks(train, 2, config, on_meta) for on_meta in (False, True))
    for (*weights, figures), (*expected, expected_figures) in zip(meta, real, strict=True):
        assert figures == expected_figures
        for found, wanted in zip(weights, expected, strict=True):
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("stage", [2, 3])
def test_nothing_is_drawn_that_will_be_loaded(stage):
    for start, *_ in run_ranks(train, 2, config_of(stage, 2, False, ("*",)), True, none_new):
        assert all(not value.any() for value in start.values())
