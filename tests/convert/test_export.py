"""Hugging Face weights out: what was imported comes out bit by bit, transformers computes what we do, one tensor at a
time is in memory; what has no architecture there is told."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from moe_dist.checkpoint.checkpoint import read_state
from moe_dist.checkpoint.stored_weights import read_tensors, write_tensors
from moe_dist.config.model_section import ModelConfig
from moe_dist.convert.hugging_face import export_folder, import_folder
from moe_dist.convert.output import parameter_shapes
from moe_dist.convert.upcycle import upcycle
from moe_dist.core.errors import UserError
from moe_dist.core.strict import validate
from moe_dist.core.tensor_files import LazyTensor
from tests.support import ROOT
from tests.support.hugging_face_models import (
    SIZES,
    load_checkpoint,
    logits_apart,
    logits_packed,
    random_documents,
    save_llama,
)


def save_mixtral(folder, *, dtype=torch.float32, max_shard_size="1GB", **changes):
    """A random Mixtral as transformers writes it. It computes in float32, with weights that `dtype` holds exactly."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "attn_implementation": "eager"} | changes
    model = MixtralForCausalLM(MixtralConfig(**sizes)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
        parameter.data = parameter.data.to(dtype).float()
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return model.float()


def tensors_of(folder):
    return {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}


VARIANTS = {
    "llama": (save_llama, {}),
    "llama, tied, one key": (save_llama, {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama, wide heads, sharded, bf16": (
        save_llama,
        {"head_dim": 16, "max_shard_size": "20KB", "dtype": torch.bfloat16},
    ),
    "mixtral": (save_mixtral, {}),
    "mixtral, top-1, tied, sharded, bf16": (
        save_mixtral,
        {"num_experts_per_tok": 1, "tie_word_embeddings": True, "max_shard_size": "20KB", "dtype": torch.bfloat16},
    ),
}


@pytest.mark.parametrize(("save", "changes"), VARIANTS.values(), ids=VARIANTS)
def test_import_and_export_are_inverse_to_the_bit(save, changes, tmp_path):
    dtype = str(changes.get("dtype", torch.float32)).removeprefix("torch.")
    save(tmp_path / "theirs", **changes)
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "out", dtype=dtype, shard_bytes=20_000)
    theirs, out = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "out")
    assert out.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert out[name].dtype == tensor.dtype and torch.equal(out[name], tensor), name

    import_folder(tmp_path / "out", tmp_path / "again")
    assert read_state(tmp_path / "again")["config"] == read_state(tmp_path / "ours")["config"]
    ours, again = read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "again")
    assert ours.keys() == again.keys() and all(torch.equal(ours[name].read(), again[name].read()) for name in ours)

    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in out.values())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 and sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"


@pytest.mark.parametrize("changes", [{}, {"num_experts_per_tok": 1}, {"head_dim": 16, "num_key_value_heads": 6}])
def test_an_imported_mixtral_computes_what_transformers_does(changes, tmp_path):
    theirs = save_mixtral(tmp_path / "theirs", **changes)
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    documents = random_documents()
    expected, found = logits_apart(theirs, documents), logits_packed(load_checkpoint(tmp_path / "ours"), documents)
    assert expected.abs().max() > 3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


SECTION = {
    "hidden_size": 48,
    "num_layers": 2,
    "num_heads": 6,
    "num_query_groups": 3,
    "head_size": 8,
    "norm": "pre",
    "qk_norm": False,
    "norm_epsilon": 1e-3,
    "rope_base": 500.0,
    "init_std": 0.3,
}
DENSE = {"type": "dense", "hidden_size": 80}
SPARSE = {
    "type": "moe",
    "hidden_size": 40,
    "router": {"type": "top_k", "num_experts": 5, "top_k": 3, "renormalize": True},
}


def put(path, ffn=SPARSE, **changes):
    """A checkpoint of ours with random weights, in a run folder."""
    section = SECTION | {"ffn": ffn} | changes
    shapes = parameter_shapes(validate(ModelConfig, section, "test"), 64)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: LazyTensor.of(0.3 * torch.randn(shape, generator=generator) + ("norm" in name))
        for name, shape in shapes.items()
    }
    write_tensors(path, tensors, {"step": 7, "config": {"model": section}})
    return path


@pytest.mark.parametrize("ffn", [DENSE, SPARSE])
def test_transformers_computes_what_our_model_does(ffn, tmp_path):
    """Every setting that config.json carries differs from its default; a run folder stands for its newest."""
    path = put(tmp_path / "run" / "checkpoints" / "step_00000007", ffn)
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "tokenizer.json").write_text("{}")
    export_folder(tmp_path / "run", tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").unlink()  # it was copied
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", attn_implementation="eager").eval()
    assert type(theirs).__name__ == ("LlamaForCausalLM" if ffn is DENSE else "MixtralForCausalLM")
    assert theirs.dtype == torch.float32
    documents = random_documents()
    ours = logits_packed(load_checkpoint(path), documents)
    assert ours.abs().max() > 3
    torch.testing.assert_close(logits_apart(theirs, documents), ours, rtol=0, atol=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_an_upcycled_llama_is_a_mixtral(tmp_path):
    llama = save_llama(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "sparse", experts="4")
    export_folder(tmp_path / "sparse", tmp_path / "out")
    mixtral = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    documents = random_documents()
    torch.testing.assert_close(logits_apart(mixtral, documents), logits_apart(llama, documents), rtol=0, atol=1e-4)


def router(**changes):
    return {"ffn": SPARSE | {"router": SPARSE["router"] | changes}}


MOMA = {"type": "modality", "text": {"type": "expert_choice", "num_experts": 2}, "image": {"type": "expert_choice", "num_experts": 2}}  # fmt: skip  # noqa: E501
NULL = {"type": "null_experts", "num_experts": 4, "num_null_experts": 2, "top_k": 2}
LORA = {"rank": 2, "alpha": 4.0}
REFUSED = {
    "swin": ({"norm": "swin"}, "model.norm is 'swin', Hugging Face's models have 'pre'"),
    "qk_norm": ({"qk_norm": True}, "model.qk_norm is 'layer_norm'; the closest architecture, mixtral, has 'none'"),
    "mixture-of-depths": ({"depth": {}}, "model.depth is not null, Hugging Face's models have None"),
    "LoRA experts": (
        {"ffn": SPARSE | {"experts": {"type": "lora", **LORA}, "router": SPARSE["router"] | {"top_k": 1}}},
        "model.ffn.experts.type is 'lora', Hugging Face's models have 'swiglu'",
    ),
    "slices": (
        {"ffn": SPARSE | {"hidden_size": 48, "slices": 2}},
        "model.ffn.slices is 2, Hugging Face's models have 1",
    ),
    "modalities": (
        {"ffn": SPARSE | {"router": MOMA}},
        "model.ffn.router.type is 'modality', Hugging Face's models have",
    ),
    "null experts": ({"ffn": SPARSE | {"router": NULL}}, "model.ffn.router.type is 'null_experts'"),
    "not renormalised, with a window": (
        router(renormalize=False) | {"sliding_window": 4},
        "model.ffn.router.renormalize is False; the closest architecture, mixtral, has True",
    ),
    "a shared expert of a width of its own": (
        {"ffn": SPARSE | {"shared_expert": {"hidden_size": 48}}},
        "model.ffn.shared_expert.gate is False; the closest architecture, qwen2_moe, has True",
    ),
    "a window in one layer": (
        {"layers": {"1": {"sliding_window": 4}}},
        r"model.sliding_window is \[0, 4\]; the closest architecture, mixtral, has \[0, 0\]",
    ),
    "sigmoid": (router(score="sigmoid"), "model.ffn.router.score is 'sigmoid'"),
    "bias": (router(bias=True), "model.ffn.router.bias is True"),
    "capacity": (
        router(capacity_factor=1.5),
        "model.ffn.router.capacity_factor is 1.5, Hugging Face's models have None",
    ),
    "heads": ({"num_heads": 9}, "model.hidden_size=48 is not a multiple of model.num_heads=9"),
}


@pytest.mark.parametrize(("changes", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_architecture_there_is_one_sentence(changes, sentence, tmp_path):
    path = put(tmp_path / "ours", **changes)
    with pytest.raises(UserError, match=rf"ours has no Hugging Face architecture: {sentence}"):
        export_folder(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours"]


def test_nothing_is_written_over_and_a_full_disk_leaves_nothing(tmp_path):
    path = put(tmp_path / "ours")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists already"):
        export_folder(path, tmp_path / "out")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*other: \[Errno 27\] File too large"):
            export_folder(path, tmp_path / "other")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "out"]


MEASURE = """
import resource, sys
from pathlib import Path
from moe_dist.convert.hugging_face import export_folder, import_folder

def peak():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))

run, hf, again = sys.argv[1:]
before = peak()
export_folder(run, hf)
exported = peak()
import_folder(hf, again)
print(before, exported, peak())
"""


@pytest.mark.slow
def test_neither_way_ever_holds_the_whole_model(tmp_path):
    """A Mixtral of 280 MiB, whose largest tensor is 4 MiB: the peak of resident memory grows by less than a quarter of
    it. Mapped files count as well: how much of them stays resident is the system's choice (seen: 31 to 49 MiB)."""
    ffn = {"type": "moe", "hidden_size": 1024, "router": SPARSE["router"] | {"num_experts": 6}}
    sizes = {"hidden_size": 512, "num_heads": 8, "num_query_groups": 8, "head_size": 64, "num_layers": 7}
    path = put(tmp_path / "ours", ffn, **sizes)
    whole = sum(tensor.nbytes for tensor in read_tensors(path).values()) / 2**20
    assert whole > 280
    folders = [str(path), str(tmp_path / "hf"), str(tmp_path / "again")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *folders],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    before, exported, imported = map(float, done.stdout.split()[-3:])
    print(
        f"{whole:.0f} MiB of weights; exported with {exported - before:.0f}, imported with {imported - before:.0f} more"
    )
    assert exported - before < whole / 4 and imported - before < whole / 4
