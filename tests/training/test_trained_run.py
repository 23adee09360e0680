"""A trained run opened without an optimizer computes bit for bit what the engine that wrote its checkpoint computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_dist.checkpoint.manifest import checkpoint_path
from moe_dist.config.recipe import load_config
from moe_dist.core.errors import UserError
from moe_dist.metrics.run_folder import RunFolder
from moe_dist.parallel.layout import make_layout
from moe_dist.training.deepspeed import init_distributed
from moe_dist.training.run import Run
from moe_dist.training.trained_run import TrainedRun
from tests.support.distributed import run_ranks
from tests.support.launching import MOMA

LORA = "model.ffn.experts={type: lora, rank: 4, alpha: 8.0, dropout: 0.05}"
TOP_1 = "model.ffn.router={type: top_k, num_experts: 4, top_k: 1, bias: true, weighting: straight_through}"
SYSTEMS = {
    "moma, ZeRO-3": ["deepspeed.zero_optimization.stage=3"],
    "frozen base, bf16": [LORA, TOP_1, "trainable=['*.router.*', '*.lora.*']", "deepspeed.bf16.enabled=true"],
}
REFUSED = {  # overrides, splits -> the sentence
    ("model.num_layers=1", ()): "is a checkpoint of another model: the model has no '",
    ("model.num_layers=3", ()): "is a checkpoint of another model: 'layers.2.",
    ("model.rope_base=5.0", ("validation",)): "cannot resume this checkpoint with another recipe: model.rope_base was",
    ("parallel.expert=3", ()): "parallel.expert=3 does not divide the 2 ranks",
}


def logits_of(forward, run, store):
    return [forward(batch).logits_TV.float() for batch in run.held_out_split.batches(store)]


def train_and_open(rank: int, overrides: list[str]) -> dict[str, object]:
    """With EP=2, save after two steps and after a third. Open the first checkpoint with EP=2 and with EP=1."""
    config = load_config(MOMA, [*overrides, "parallel.expert=2", "schedule.peak_lr=0.01"])
    folder = RunFolder(Path(config.run.dir))
    run = Run.build(config, make_layout(expert=2, device=init_distributed()), folder)
    if rank == 0:
        folder.open(config)
    for _ in range(2):
        run.train_step()
    trained = logits_of(run.engine.eval_forward, run, run.held_out)
    with run.saver:
        run.save()
        run.train_step()
        run.save()
    earlier = f"run.resume={checkpoint_path(folder.path, 2)}"
    found: dict[str, object] = {"newest": TrainedRun.find(folder, []).checkpoint.name}
    for expert in (2, 1):
        opened = TrainedRun.find(folder, [f"parallel.expert={expert}", earlier]).open("validation")
        again = logits_of(opened.forward, opened, opened.documents["validation"])
        found[f"apart, EP={expert}"] = max(float((a - b).abs().max()) for a, b in zip(trained, again, strict=True))
        found["rest"] = (opened.step, sorted(opened.documents), opened.model.training)
    for (override, splits), _ in REFUSED.items():
        with pytest.raises(UserError) as refused:
            TrainedRun.find(folder, ["parallel.expert=1", override]).open(*splits)
        found[override] = str(refused.value)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_an_opened_run_is_the_engines_model(system, overrides):
    for found in run_ranks(train_and_open, 2, [*overrides, *SYSTEMS[system]]):
        assert found["apart, EP=2"] == 0.0
        assert found["apart, EP=1"] < (0.05 if "bf16" in system else 1e-4), found
        assert found["newest"] == "step_00000003"
        assert found["rest"] == (2, ["validation"], False)
        for (override, _), sentence in REFUSED.items():
            assert sentence in found[override], found[override]


def find_without_checkpoint(rank, path):
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        TrainedRun.find(RunFolder(path), [])
    return True


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    RunFolder(tmp_path).open(load_config(MOMA))
    assert run_ranks(find_without_checkpoint, 1, tmp_path) == [True]
