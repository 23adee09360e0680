"""Both training stages as a user starts them: mixture-of-depths on two ranks, then auxiliary routers; evaluation."""

import json

import pytest

from moe_dist.metrics.metric_keys import undeclared
from tests.support.launching import ALONE, TORCHRUN, launch, launch_tool
from tests.support.selections import ONE_DECISION

SHORT = ["train.steps=4", "schedule.warmup_steps=1", "eval.every=4", "checkpoint.every=4", "model.num_layers=3"]
DEPTH = "model.depth={capacity: 0.25, every: 2, scope: modality, auxiliary: %s}"


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_mixture_of_depths_then_causal_routers_then_evaluation(overrides, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    common = [*overrides, *SHORT]
    done = launch(TORCHRUN, [*common, DEPTH % "false", f"run.dir={first}"], config="configs/mod_moma_quickstart.yaml")
    assert done.returncode == 0, done.stderr
    start = metrics_of(first)
    assert not undeclared(start[-1]) and not start[-1]["causal"]
    for layer in (0, 2):  # each modality at its fraction, rounded up in every group
        for modality in ("text", "image"):
            assert 0.25 <= start[-1][f"moe/{layer}/admitted/{modality}"] < 0.3
    assert "moe/1/admitted/text" not in start[-1]

    stage = [*common, DEPTH % "true", f"run.dir={second}", f"init_from.checkpoint={first}"]
    done = launch(TORCHRUN, stage, config="configs/moma_causal_quickstart.yaml")
    assert done.returncode == 0, done.stderr
    lines = metrics_of(second)
    assert not undeclared(lines[-1]) and lines[-1]["loss/causal_routers"] < lines[0]["loss/causal_routers"]
    for key in ("moe/0/depth_accuracy", "moe/2/depth_recall", "moe/1/auxiliary_accuracy/text"):
        assert 0 <= lines[-1][key] <= 1
    # Only the auxiliary routers have changed, so the loss with the training routing has not.
    assert lines[-1]["eval/loss"] == pytest.approx(start[-1]["eval/loss"], abs=1e-6)

    done = launch_tool(ALONE, "evaluate.py", [str(second), "parallel.expert=1"])
    assert done.returncode == 0, done.stderr
    found = json.loads((second / "evaluation.json").read_text())
    assert found["eval/loss"] == pytest.approx(lines[-1]["eval/loss"], abs=ONE_DECISION)
    assert {"eval/causal/loss", "eval/causal/loss/text", "eval/causal/loss/image"} <= found.keys()
    assert abs(found["eval/causal/loss"] - found["eval/loss"]) > 1e-6
    assert {"causal", "non-causal"} <= set(done.stdout.split())  # each row of the table names its routing
    for key in ("eval/loss", "eval/causal/loss", "eval/bigram", "eval/shuffled/loss"):
        assert f"{found[key]:.3f}" in done.stdout, key
    gains = [line for line in " ".join(done.stdout.split()).split("Before an image") if "nats per code" in line]
    assert len(gains) == 2 and "non-causal" in gains[0] and "non-causal" not in gains[1]

    done = launch_tool(ALONE, "evaluate.py", [str(first), "parallel.expert=1"])
    assert done.returncode == 0, done.stderr
    assert "held-out loss after 4 steps, non-causal (expert choice)" in " ".join(done.stdout.split())

    done = launch_tool(TORCHRUN, "experts_by_token.py", [str(second), "parallel.expert=2"])
    assert done.returncode == 0, done.stderr
    found = json.loads((second / "experts_by_token.json").read_text())
    assert found["step"] == 4 and len(found["layers"]) == 3 and f"{found['experts_per_token']:.2f}" in done.stdout
    assert {"word start", "inside a word", "marker", "image code"} <= found["classes"].keys()
    assert (second / "experts_by_token.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_stage_without_auxiliary_routers_is_refused(overrides):
    plain = "model.ffn.router={type: expert_choice, num_experts: 4}"
    done = launch(ALONE, [*overrides, plain, "parallel.expert=1", "losses={causal_routers: {weight: 1}}"])
    assert done.returncode == 2 and "the model has no auxiliary router" in done.stderr
