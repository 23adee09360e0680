"""LoRA out: merged into the weights, and as PEFT adapters. transformers and PEFT compute what our model does."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from launch import convert
from moe_dist.checkpoint.manifest import read_state
from moe_dist.checkpoint.stored_weights import read_tensors, write_tensors
from moe_dist.config.model_section import ModelConfig
from moe_dist.convert.families.family_registry import family_of
from moe_dist.convert.hugging_face import export_folder, import_folder
from moe_dist.convert.output import parameter_shapes
from moe_dist.convert.upcycle import upcycle
from moe_dist.core.errors import UserError
from moe_dist.core.strict import validate
from moe_dist.core.tensor_files import LazyTensor
from tests.convert.test_families import step
from tests.support.family_models import reference_model, save_model
from tests.support.hugging_face_models import load_checkpoint, logits_apart, logits_packed, random_documents
from tests.support.model_batches import LORA_EXPERTS, VOCAB, model_config

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]}
CASES = {
    "llama": ("llama", {}, ["*"]),
    "qwen2, some parts": ("qwen2", {}, ["attention.q", "attention.v", "ffn.down"]),
    "mixtral": ("mixtral", {}, ["*"]),
    "mixtral, up and down": ("mixtral", {}, ["experts.up", "experts.down"]),
    "mixtral, gate alone": ("mixtral", {}, ["experts.gate", "attention.o"]),
    "mixtral, gate and up": ("mixtral", {}, ["experts.gate", "experts.up"]),
    "olmoe, router": ("olmoe", {}, ["router", "attention.*"]),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 8, "mlp_only_layers": [1]}, ["*"]),
    "qwen2_moe": ("qwen2_moe", SHARED, ["*"]),
    "qwen2_moe, shared": ("qwen2_moe", SHARED, ["shared_expert.*", "ffn.up"]),
}
EXACT = {"rtol": 0, "atol": 1e-4}


def put(folder, section, tensors=None, trainable=("*.lora.*",)):
    """Write a checkpoint of ours: the given tensors, and random ones for the rest, the deltas above all."""
    model = validate(ModelConfig, section, "test")
    generator = torch.Generator().manual_seed(1)
    shapes = parameter_shapes(model, VOCAB if tensors is None else tensors["embedding.weight"].shape[0])
    drawn = {name: LazyTensor.of(0.1 * torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    config = {"model": model.model_dump(mode="json", exclude_unset=True), "trainable": list(trainable)}
    write_tensors(folder, drawn | (tensors or {}), {"step": 7, "config": config})
    return folder


def adapted(tmp_path, kind, changes, targets, **more):
    """Import a random model of a family, and give it deltas. Returns the family's folder, and our checkpoint."""
    save_model(kind, tmp_path / "hf", **changes)
    import_folder(tmp_path / "hf", tmp_path / "plain")
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    model, _ = family_of(raw, "test").model_section(raw, "test")
    lora = {"rank": 3, "alpha": 7.0, "dropout": 0.1, "targets": targets}
    section = model.model_dump(mode="json", exclude_unset=True) | {"lora": lora}
    return tmp_path / "hf", put(tmp_path / "ours", section, read_tensors(tmp_path / "plain"), **more)


SLOW = {"mixtral, gate and up", "qwen2_moe, shared"}  # parts of "mixtral" and "qwen2_moe"


@pytest.mark.parametrize(
    ("kind", "changes", "targets"),
    [pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, case in CASES.items()],
)
def test_merged_and_as_an_adapter_transformers_computes_what_we_do(kind, changes, targets, tmp_path, capsys):
    hf, ours = adapted(tmp_path, kind, changes, targets)
    documents = random_documents()
    expected = logits_packed(load_checkpoint(ours).eval(), documents)
    base = reference_model(hf)
    assert (logits_apart(base, documents) - expected).abs().max() > 0.1, "the deltas matter"

    convert.main(["export", "--from", str(ours), "--to", str(tmp_path / "merged")])
    torch.testing.assert_close(logits_apart(reference_model(tmp_path / "merged"), documents), expected, **EXACT)

    convert.main(["export", "--adapters", "--from", str(ours), "--to", str(tmp_path / "adapter")])
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path / 'adapter'}: PEFT adapter"
    peft = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_apart(peft, documents), expected, **EXACT)
    held = sum(parameter.numel() for name, parameter in peft.named_parameters() if "lora_" in name)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert held == sum(tensor.numel() for tensor in stored.values()), "PEFT uses every tensor, and draws none"
    files = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]


def test_deepseek_moe_merged_and_one_module_per_expert_in_its_adapter(tmp_path):
    """transformers has no such model. Its own code has a linear layer for each matrix of each expert."""
    hf, ours = adapted(tmp_path, "deepseek", {}, ["experts.*", "router"])
    documents = random_documents()
    export_folder(ours, tmp_path / "merged")
    expected = logits_packed(load_checkpoint(ours).eval(), documents)
    found = logits_apart(reference_model(tmp_path / "merged"), documents)
    torch.testing.assert_close(found, expected, **EXACT)
    convert.main(["export", "--adapters", "--from", str(ours), "--to", str(tmp_path / "adapter")])
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    base, merged = load_file(hf / "model.safetensors"), reference_model(tmp_path / "merged").state_dict()
    moved = {name for name, weight in merged.items() if not torch.equal(weight, base[name])}
    assert {f"base_model.model.{name.removesuffix('weight')}lora_A.weight" for name in moved} <= adapter.keys()
    for name in moved:
        a, b = (adapter[f"base_model.model.{name.removesuffix('weight')}lora_{key}.weight"] for key in "AB")
        torch.testing.assert_close(merged[name], base[name] + 7 / 3 * b @ a, rtol=0, atol=1e-6)


def test_merging_is_exact_to_rounding(tmp_path):
    """Each merged weight is the float64 sum, rounded once. A bf16 weight, as a run freezes it, stays exact."""
    save_model("llama", tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "plain")
    section = stored_section(tmp_path / "plain") | {"lora": {"rank": 2, "alpha": 3.0, "targets": ["ffn.down"]}}
    tensors = {
        name: LazyTensor.of(tensor.read().bfloat16()) for name, tensor in read_tensors(tmp_path / "plain").items()
    }
    ours = put(tmp_path / "ours", section, tensors)
    export_folder(ours, tmp_path / "merged")
    stored, merged = read_tensors(ours), reference_model(tmp_path / "merged").state_dict()
    name = "layers.1.ffn.down"
    a, b = (stored[f"{name}.lora.down.{key}"].read().double() for key in "ab")
    expected = stored[f"{name}.weight"].read().double() + 3 / 2 * (a @ b).T
    assert torch.equal(merged["model.layers.1.mlp.down_proj.weight"], expected.float())
    untouched = stored["layers.1.attention.core.linear_proj.weight"].read()
    assert torch.equal(merged["model.layers.1.self_attn.o_proj.weight"], untouched.float())


def stored_section(folder):
    return read_state(folder)["config"]["model"]


def test_a_model_of_no_family_gives_its_own_parameters(tmp_path, capsys):
    """LLaVA-MoLE: the deltas and the routers, both trained, under our names."""
    section = model_config(LORA_EXPERTS, lora={"rank": 2, "alpha": 4.0}).model_dump(mode="json")
    ours = put(tmp_path / "ours", section, trainable=("*.lora.*", "*.router.*"))
    convert.main(["export", "--adapters", "--from", str(ours), "--to", str(tmp_path / "out")])
    assert "no PEFT adapter, because no Hugging Face family has such a model" in capsys.readouterr().out
    found, stored = load_file(tmp_path / "out" / "lora.safetensors"), read_tensors(ours)
    assert found.keys() == {name for name in stored if ".lora." in name or ".router." in name}
    assert all(torch.equal(tensor, stored[name].read()) for name, tensor in found.items())
    about = json.loads((tmp_path / "out" / "lora.json").read_text())
    assert validate(ModelConfig, about["model"], "test") == validate(ModelConfig, section, "test")


def test_an_upcycled_model_has_the_merged_weights(tmp_path):
    _, ours = adapted(tmp_path, "llama", {}, ["attention.*", "ffn.*"])
    upcycle(ours, tmp_path / "sparse", experts="2")
    documents = random_documents()
    expected = logits_packed(load_checkpoint(ours).eval(), documents)
    torch.testing.assert_close(logits_packed(load_checkpoint(tmp_path / "sparse"), documents), expected, **EXACT)


def test_what_an_adapter_cannot_hold_is_refused(tmp_path):
    _, ours = adapted(tmp_path, "mixtral", {}, ["experts.*"], trainable=("*.lora.*", "*.router.*"))
    out = ["--adapters", "--to", str(tmp_path / "out"), "--from"]
    with pytest.raises(UserError, match=r"ours: the run also trained 'layers.0.ffn.router.gate.weight', which a PEFT"):
        convert.main(["export", *out, str(ours)])
    with pytest.raises(UserError, match="plain holds a model without LoRA, so there are no adapters to export"):
        convert.main(["export", *out, str(tmp_path / "plain")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours", "plain"]


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["*"]),
        ("mixtral", ["experts.down", "attention.*"]),
        ("qwen3_moe", ["experts.down", "router", "ffn.*"]),
    ],
)
def test_four_steps_of_sgd_equal_peft(name, targets, tmp_path):
    """The same batches, gradients of the deltas alone, without dropout. Not the experts' gate and up: transformers
    stores them as one matrix, whose single adapter in PEFT also trains what is zero in ours.
    """
    kind, changes, _ = CASES[name]
    hf, ours = adapted(tmp_path, kind, changes, targets)
    convert.main(["export", "--adapters", "--from", str(ours), "--to", str(tmp_path / "adapter")])
    theirs = PeftModel.from_pretrained(reference_model(hf), tmp_path / "adapter", is_trainable=True).eval()
    losses = []
    for model, part in ((theirs, "lora_"), (load_checkpoint(ours).eval(), ".lora.")):
        deltas = [parameter for key, parameter in model.named_parameters() if part in key]
        losses.append([step(model, deltas, seed) for seed in range(4)])
    assert losses[0][0] != losses[0][3]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
