"""Kernel launches that one more layer costs (tests/support/kernel_launches.py).

Each bound is the present count, so one more launch fails.

Counted on the CPU in bf16 under the engine, with accumulation into float32. A few things differ on CUDA: there RMSNorm
is one launch (here seven), and attention is one (here six: documents are gathered, attended and put back).
"""

import pytest

from moe_dist.losses.objective import make_objective
from moe_dist.losses.term import Context
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import make_layout
from moe_dist.training.deepspeed import init_distributed, make_engine
from tests.support.distributed import run_ranks
from tests.support.kernel_launches import Launches
from tests.support.model_batches import DENSE, MOMA, VOCAB, make_batch, model_config
from tests.support.toy_model import make_config

MODELS = {"dense": (DENSE, {}), "moma": (MOMA, {}), "mod_moma": (MOMA, {"depth": {"every": 1}})}
BOUNDS = {  # forward, backward, optimizer step
    "dense": (39, 111, 20),
    "moma": (81, 149, 24),
    "mod_moma": (136, 174, 26),
}


def _count(rank, ffn, changes, layers, stage):
    """Count the launches of the third micro-step, after all one-time work."""
    device = init_distributed()
    config = make_config(groups=1, deepspeed=_adam(stage))
    layout = make_layout(expert=1, device=device)
    model = Transformer(model_config(ffn, num_layers=layers, **changes), VOCAB, layout, seed=0)
    zero = make_engine(model, config, layout)._zero
    batch = make_batch([16] * 8)  # one bucket of documents, with mixture-of-depths as well
    for _ in range(3):
        objective = make_objective({}, Context(layout=layout, group_sequences=1), step=0)
        counts = dict(zip(objective.names, objective.counts(batch)))
        with Launches() as forward:
            output = zero(batch.tokens_T, batch.info)
        loss = objective(output, batch, counts).loss
        with Launches() as backward:
            zero.backward(loss)
        with Launches() as step:
            zero.step()
    return [forward.counts, backward.counts, step.counts]


def _adam(stage):
    return {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
    }


def launches_of_a_layer(name, stage=1):
    """Return the launches of four layers minus those of three, by phase and operation."""
    ffn, changes = MODELS[name]
    three, four = (run_ranks(_count, 1, ffn, changes, layers, stage)[0] for layers in (3, 4))
    for more, less in zip(four, three):
        more.subtract(less)
    return [{operation: count for operation, count in more.most_common() if count} for more in four]


@pytest.mark.parametrize("name", MODELS)
def test_launches_of_a_layer(name):
    for counts, bound in zip(launches_of_a_layer(name), BOUNDS[name]):
        assert sum(counts.values()) <= bound, counts
