"""Complete training jobs as a user starts them: real launchers, two ranks, real shards and DeepSpeed, at test size."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch

from moe_dist.checkpoint.checkpoint import read_state
from moe_dist.data.tokenizers.text_tokenizer import train_text_tokenizer
from moe_dist.data.tokenizers.vq import VQConfig, VQTokenizer
from moe_dist.metrics.metric_keys import undeclared
from moe_dist.metrics.run_folder import read_status
from tests.checkpoint.test_checkpoint import read
from tests.support import ROOT
from tests.support.launching import ALONE, DEEPSPEED, MPIEXEC, TORCHRUN, launch, launch_tool
from tests.support.long import REPEATED
from tests.support.selections import ONE_DECISION


def metrics_of(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_main_job_and_an_exact_resume(overrides, tmp_path):
    """A run with two threads per rank, stopped after 4 of 8 steps and resumed, is bitwise an undisturbed run."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert launch(DEEPSPEED, [*overrides, f"run.dir={whole}"], threads=2).returncode == 0
    first = launch(DEEPSPEED, [*overrides, f"run.dir={parts}", "train.stop_after=4"], threads=2)
    assert first.returncode == 0, first.stderr
    stopped = {"state": "stopped", "step": 4, "reason": "train.stop_after", "restart": False, "updated": 0}
    assert read_status(parts) | {"updated": 0} == stopped
    second = launch(DEEPSPEED, [*overrides, f"run.dir={parts}"], threads=2)
    assert second.returncode == 0, second.stderr
    assert read_status(parts)["state"] == "done"

    lines = metrics_of(whole)
    assert [line["step"] for line in lines] == list(range(1, 9)) == [line["step"] for line in metrics_of(parts)]
    assert same_but_for_time(lines) == same_but_for_time(metrics_of(parts))
    assert lines[0]["loss"] - lines[-1]["loss"] > 0.02  # it learns, so equality is not trivial
    last = "checkpoints/step_00000008"
    assert stored(whole / last) == stored(parts / last)
    states = [read_state(run / last) for run in (whole, parts)]
    for key in ("step", "tokens", "loader"):  # including the data to be read next
        assert states[0][key] == states[1][key]

    assert undeclared(lines[-1]) == []
    for key in ("eval/loss/text", "eval/loss/image", "moe/1/utilization", "moe/rank_imbalance", "data_wait_seconds"):
        assert key in lines[-1]
    for name in ("config.yaml", "loss.png", "routing.png", "tensorboard", "samples"):
        assert (whole / name).exists()
    assert "non-causal" in second.stdout  # expert choice depends on later tokens, and the output says so


def same_but_for_time(lines):
    """Return the metrics without those that differ between two equal runs."""
    return [{k: v for k, v in line.items() if not k.endswith(("seconds", "per_second"))} for line in lines]


def stored(checkpoint):
    """Return the name and checksum of every file of tensors."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, MPIEXEC], ids=["torchrun", "mpiexec"])
def test_other_launchers_agree_with_one_process(launcher, overrides, tmp_path):
    short = [*overrides, "train.stop_after=2", "deepspeed.optimizer.params.eps=1e-3"]  # see docs/moma.md, near-ties
    one, two = tmp_path / "one", tmp_path / "two"
    alone = launch(ALONE, [*short, f"run.dir={one}", "parallel.expert=1"])
    assert alone.returncode == 0, alone.stderr
    ranks = launch(launcher, [*short, f"run.dir={two}"])
    assert ranks.returncode == 0, ranks.stderr
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=ONE_DECISION)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)


@pytest.mark.slow
def test_an_evaluation_at_another_layout_finds_the_losses_of_training(overrides, tmp_path):
    """A run is trained on one rank and evaluated on two; the output marks losses with expert choice as non-causal."""
    short = [*overrides, "parallel.expert=1", "train.stop_after=2"]
    trained = launch(ALONE, short)
    assert trained.returncode == 0, trained.stderr
    done = launch_tool(TORCHRUN, "evaluate.py", [str(tmp_path / "run"), "parallel.expert=2"])
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    last = metrics_of(tmp_path / "run")[-1]
    assert (found["step"], found["causal"]) == (2, False)
    for key in ("eval/loss", "eval/loss/text", "eval/loss/image"):
        assert found[key] == pytest.approx(last[key], abs=ONE_DECISION), key
    assert "held-out loss after 2 steps, non-causal (expert choice)" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_memory_of_the_quickstart_stays_under_three_gib_a_rank(overrides, emoji_samples, tmp_path):
    """The shipped recipe with its full vocabulary (1,024 pieces, 512 codes), but little data and three steps."""
    texts = [*(sample.caption for sample in emoji_samples), (ROOT / "LICENSE").read_text()]
    assert train_text_tokenizer(texts, tmp_path / "text.model", vocab_size=1024).size == 1024
    vq = VQTokenizer(VQConfig())
    vq.quantizer._codebook.initted.fill_(True)  # as after training
    vq.save(tmp_path / "vq")
    own = [override for override in overrides if override.startswith(("run.dir", "data.shards"))]
    own += [f"data.text_tokenizer={tmp_path / 'text.model'}", f"data.image_tokenizer={tmp_path / 'vq'}"]
    kept = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}  # as `make train` sets them
    done = launch(DEEPSPEED, [*own, "train.stop_after=3", "eval.groups=2"], variables=kept)
    assert done.returncode == 0, done.stderr
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # GiB, the largest of all processes so far
    print(f"largest resident memory of a rank: {largest:.2f} GiB")
    assert 0.3 < largest < 3


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["dense_quickstart", "moe_8x_quickstart", "adamoe_top2_quickstart"])
def test_the_other_quickstarts_train(recipe, overrides):
    done = launch(TORCHRUN, [*overrides, "train.stop_after=2"], config=f"configs/{recipe}.yaml")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_adamoe_trains_on_text_and_says_what_it_saves(overrides, tmp_path):
    own = [*overrides, "data.image_tokenizer=null", "train.stop_after=2", "telemetry.tensorboard=false"]
    done = launch(TORCHRUN, own, config="configs/adamoe_quickstart.yaml")
    assert done.returncode == 0, done.stderr
    lines = metrics_of(tmp_path / "run")
    assert len(lines) == 2 and undeclared(lines[-1]) == []
    for line in lines:
        assert line["causal"] and "loss/image" not in line
        assert 1.2 < line["moe/experts_per_token"] < 1.8  # 1.5 at balance
        assert line["moe/experts_per_token"] == pytest.approx(line["moe/1/experts_per_token/text"], abs=0.3)
        assert 0 < line["moe/flops_saved"] < 1 - line["moe/experts_per_token"] / 2  # experts are only a part
        assert 2.9 < line["loss/load_balance"] < 4  # top_k at balance
    experts, saved = (lines[-1][f"moe/{key}"] for key in ("experts_per_token", "flops_saved"))
    assert f"{experts:.2f} true experts/token | {saved:.1%} FLOPs saved" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.stpes=3", "unknown key 'train.stpes' (did you mean 'steps'?)"),
        pytest.param("deepspeed.gradient_cliping=0.3", "gradient_cliping", marks=REPEATED),
        pytest.param("model.ffn.router.text={type: expert_choice, num_expert: 4}", "num_expert", marks=REPEATED),
        ("model.ffn.experts={type: lora, rank: 0, alpha: 8}", "model.ffn.experts.rank"),
        pytest.param("model.ffn.experts={type: lora, rank: 4, alpha: 8}", "needs exactly 1 expert", marks=REPEATED),
        ("parallel.expert=2", "parallel.expert=2 does not divide the 1 ranks of this run"),
        ("data.shards=/nowhere", "/nowhere"),
        ("data.text_tokenizer=/nowhere.model", "/nowhere.model"),
        ("run.resume=/nowhere", "run.resume=/nowhere is neither a complete checkpoint nor a run folder with one: "),
        ("data.lanes=4", None),
    ],
)
def test_bad_input_alone(override, sentence, overrides):
    result = launch(ALONE, [*overrides, "parallel.expert=1", "train.stop_after=1", override])
    if sentence is None:
        assert result.returncode == 0, result.stderr
    else:
        _failed_with(result, sentence)


@pytest.mark.slow
def test_bad_input_on_ranks(overrides, tmp_path):
    """An error on one rank ends all ranks: a shard that only rank 1 reads is truncated."""
    seven = [*overrides, "model.ffn.router.text.num_experts=3"]
    _failed_with(launch(TORCHRUN, seven), "parallel.expert=2 does not divide the model's 7 experts")
    shard = sorted((tmp_path / "shards" / "train").glob("*.tar"))[1]
    shard.write_bytes(shard.read_bytes()[:-4096])
    _failed_with(launch(DEEPSPEED, overrides), shard.name)
    _failed_with(launch(TORCHRUN, [*overrides, "parallel.expert=3"]), "parallel.expert=3 does not divide the 2 ranks")


@pytest.mark.slow
def test_a_checkpoint_of_another_model_or_other_tokenizers(overrides, tokenizers, tmp_path):
    model = shutil.copy(tokenizers / "text.model", tmp_path)
    short = [*overrides, "parallel.expert=1", "train.stop_after=1", f"data.text_tokenizer={model}"]
    assert launch(ALONE, short).returncode == 0
    again = [*short, f"run.resume={tmp_path / 'run' / 'checkpoints' / 'step_00000001'}", "train.stop_after=2"]
    _failed_with(launch(ALONE, [*again, "model.num_layers=1"]), "model.num_layers was 2 and is now 1")
    shutil.copy(tokenizers / "other.model", model)
    _failed_with(launch(ALONE, again), "step_00000001 was trained with other tokenizers than text tokenizer")


@pytest.mark.slow
def test_a_second_stage_starts_from_the_first(overrides, tokenizers, tmp_path):
    """A dense run on one rank, then LoRA experts over its frozen weights on two, resumed without the dense run."""
    first, second = tmp_path / "first", tmp_path / "second"
    dense = [*overrides, f"run.dir={first}", "train.stop_after=2"]
    assert launch(ALONE, dense, config="configs/dense_quickstart.yaml").returncode == 0
    before = read(first / "checkpoints" / "step_00000002")

    own = "['layers.*.ffn.router.*', 'layers.*.lora.*']"
    rename = "{'layers.*.ffn.*': 'layers.*.ffn.experts.base.*'}"
    stage = [
        *[*overrides, f"run.dir={second}", "parallel.expert=2", f"trainable={own}"],
        "model.ffn={type: moe, hidden_size: 32, experts: {type: lora, rank: 4, alpha: 8.0}, "
        "router: {type: top_k, num_experts: 4, top_k: 1}}",
        f"init_from={{checkpoint: {first}, rename: {rename}, new: {own}}}",
    ]
    begun = launch(TORCHRUN, [*stage, "train.stop_after=2"])
    assert begun.returncode == 0, begun.stderr
    account = json.loads((second / "init_from.json").read_text())
    assert account["init_from"]["checkpoint"] == str(first / "checkpoints" / "step_00000002")
    after = read(second / "checkpoints" / "step_00000002")
    frozen = {name.partition("/")[2]: tensor for name, tensor in after.items() if name.startswith("frozen/")}
    source = {entry["name"]: entry["from"] for entry in account["loaded"]["entries"]}
    assert frozen.keys() == source.keys() and {f"master/{name}" for name in source.values()} <= before.keys()
    assert all(torch.equal(tensor, before[f"master/{source[name]}"]) for name, tensor in frozen.items())
    assert source["layers.1.ffn.experts.base.down.weight"] == "layers.1.ffn.down.weight"
    row = next(line for line in begun.stdout.splitlines() if "loaded" in line)
    assert str(account["loaded"]["tensors"]) in row and f"{account['loaded']['parameters']:,}" in row

    wrong = [*stage, "run.resume=none", "train.stop_after=3"]
    other = [*wrong, "parallel.expert=1", f"data.image_tokenizer={tokenizers / 'other_vq'}"]
    _failed_with(launch(ALONE, other), "step_00000002 was trained with other tokenizers than text tokenizer")
    shutil.rmtree(first)
    _failed_with(launch(ALONE, [*wrong, "parallel.expert=1"]), f"init_from.checkpoint={first} is neither a complete")
    again = launch(TORCHRUN, [*stage, "train.stop_after=3"])
    assert again.returncode == 0, again.stderr
    assert "resumed after step 2: init_from is not read again" in again.stdout
    assert len(list((second / "checkpoints" / "frozen").iterdir())) == 1, "the frozen weights are written once"


def _failed_with(result, sentence):
    """Check for a non-zero exit status and one error sentence, without a traceback."""
    output = result.stdout + result.stderr
    assert result.returncode != 0
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and sentence in errors[0], output
    assert "moe_dist/training/run.py" not in output  # torchrun prints its own traceback
