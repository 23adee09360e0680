"""Tasks during training under ZeRO-3 on two ranks, and launch/lm_eval.py on the run's checkpoint on one."""

import json

from moe_dist.config.recipe import load_config
from moe_dist.metrics.metric_keys import undeclared
from moe_dist.training.run import train
from tests.launch.test_train import metrics_of
from tests.support.distributed import run_ranks
from tests.support.launching import ALONE, launch_tool
from tests.support.task_cases import write_tasks


def train_on_rank(rank, overrides):
    train(load_config("configs/moe_8x_quickstart.yaml", overrides))


def test_tasks_during_training_and_after_it(tokenizers, tmp_path):
    letters, _, rolling, continued, _ = write_tasks(tmp_path)
    run = tmp_path / "run"
    overrides = [
        f"data.shards={tmp_path / 'letter_shards'}",
        f"data.text_tokenizer={tokenizers / 'text.model'}",
        "data.image_tokenizer=null",
        *["data.sequence_length=192", "data.group_sequences=2", "data.lanes=4", "data.max_bad_fraction=0.2"],
        *["model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.ffn.hidden_size=32"],
        *[
            "telemetry.tensorboard=false",
            "train.steps=3",
            "schedule.warmup_steps=1",
            "eval.every=3",
            "eval.groups=2",
            "parallel.expert=2",
        ],
        *["eval.tasks_every=2", "eval.task_limit=9", f"eval.tasks={[letters, rolling, continued]}"],
        "model.ffn.router={type: top_k, num_experts: 4, top_k: 2}",
        *["deepspeed.zero_optimization.stage=3", f"run.dir={run}"],
    ]
    run_ranks(train_on_rank, 2, overrides)
    first, second, third = metrics_of(run)
    run_ranks(train_on_rank, 2, [*overrides, "eval.tasks=[]", f"run.dir={tmp_path / 'without'}"])
    assert [line["loss"] for line in metrics_of(tmp_path / "without")] == [first["loss"], second["loss"], third["loss"]]
    of_tasks = {key: value for key, value in third.items() if key.startswith("eval/tasks/")}
    assert of_tasks.keys() == {key for key in second if key.startswith("eval/tasks/")}
    assert not any(key.startswith("eval/tasks/") for key in first)
    assert undeclared(third) == []
    assert third["eval/loss/low"] < third["eval/loss"] < third["eval/loss/high"]
    assert third["eval/accuracy/low"] <= third["eval/accuracy"] <= third["eval/accuracy/high"]

    tasks = ["--tasks", letters, rolling, continued, "--limit", "9"]
    done = launch_tool(ALONE, "lm_eval.py", [str(run), "parallel.expert=1", *tasks])
    assert done.returncode == 0, done.stderr
    assert "letter_emoji" in done.stdout
    found = json.loads((run / "lm_eval.json").read_text())
    assert found["step"] == 3
    for metric in found["metrics"]:
        key = f"eval/tasks/{metric['task']}/{metric['metric']}"
        assert abs(metric["value"] - of_tasks[key]) < 1e-4, key
    answers = [json.loads(line) for line in (run / "lm_eval.jsonl").read_text().splitlines()]
    assert [answer["task"] for answer in answers].count("letter_emoji") == 9
