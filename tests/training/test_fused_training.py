"""Compiled functions inside a whole model under DeepSpeed: the steps are those of the uncompiled model.

A GPU compiles them with Inductor; here they are traced, differentiated, partitioned and run operation by operation.
"""

import pytest
import torch

from moe_dist.core import seeding as random
from moe_dist.losses import language
from moe_dist.losses.objective import make_objective
from moe_dist.losses.term import Context
from moe_dist.model import attention, mcore
from moe_dist.model.moe import experts, swiglu
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import make_layout
from moe_dist.training.deepspeed import init_distributed, make_engine
from tests.support.distributed import run_ranks
from tests.support.model_batches import DENSE, LORA_EXPERTS, MOMA, VOCAB, make_batch, model_config
from tests.support.toy_model import make_config, sgd

FUSED = [
    (swiglu, "gated"),
    (experts, "gated"),
    (experts, "weighted"),
    (mcore, "_layer_norm"),
    (attention, "rotate"),
    (language, "_cross_entropy"),
    (random, "_drop"),
]
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1}
MODELS = {
    "dense": (DENSE, {}),
    "moma": (MOMA, {"recompute": True}),
    "depth": (MOMA, {"depth": {}}),
    "lora": ({**LORA_EXPERTS, "experts": {"type": "lora", **LORA}}, {"lora": LORA}),
}


def _steps(rank, name, stage, bf16, compiled):
    """Return the losses and gradient norms of three steps, and the number of compiled functions."""
    calls = set()
    with pytest.MonkeyPatch.context() as patch:
        for module, key in FUSED if compiled else ():
            patch.setattr(module, key, _compiled(getattr(module, key).__wrapped__, key, calls))
        if compiled:
            patch.setattr(language, "is_compiled_for", lambda x: True)
        device = init_distributed()
        trainable = ("*.router.*", "*.lora.*") if name == "lora" else ("*",)
        config = make_config(groups=2, deepspeed=sgd(stage, bf16={"enabled": bf16}), trainable=trainable)
        layout = make_layout(expert=1, device=device)
        ffn, changes = MODELS[name]
        engine = make_engine(Transformer(model_config(ffn, **changes), VOCAB, layout, seed=0), config, layout)
        found = []
        for step in range(3):
            objective = make_objective({}, Context(layout=layout, group_sequences=1), step)
            lengths = [([40, 24, 30], [50, 7, 3])[step % 2]] * 2
            result = engine.train_step(
                [make_batch(length, padding=8, seed=step, first_token_id=128 * i) for i, length in enumerate(lengths)],
                objective,
                0.1,
            )
            found.append((result.loss_sums["loss"] / result.counts["loss"], result.grad_norm))
    return found, calls


def _compiled(function, key, calls):
    run = torch.compile(function, backend="aot_eager_decomp_partition")

    def noted(*arguments):
        calls.add(key)
        return run(*arguments)

    return noted


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_steps_of_compiled_functions(name, stage, bf16):
    (eager, none), (compiled, calls) = (run_ranks(_steps, 1, name, stage, bf16, on)[0] for on in (False, True))
    expected = {"_layer_norm", "rotate", "_cross_entropy", "gated"}
    expected |= {"weighted"} if name in ("moma", "depth") else set()
    assert not none and calls == (expected - {"gated"} | {"_drop"} if name == "lora" else expected)
    if bf16:  # rounding moves near-ties of the routing, and from the second step on the weights
        compiled, eager = compiled[:1], eager[:1]
    for (loss, norm), (wanted, wanted_norm) in zip(compiled, eager, strict=True):
        assert loss == pytest.approx(wanted, rel=5e-3 if bf16 else 1e-5)
        assert norm == pytest.approx(wanted_norm, rel=0.1 if bf16 else 1e-4)
