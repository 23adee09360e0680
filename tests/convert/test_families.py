"""Every family of Hugging Face models: transformers' logits, exact ways in and out, the settings of real models."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from moe_dist.checkpoint.checkpoint import read_state
from moe_dist.checkpoint.stored_weights import read_tensors
from moe_dist.convert import pretrained
from moe_dist.convert.families.family_registry import FAMILIES
from moe_dist.convert.hugging_face import export_folder, import_folder
from moe_dist.core.tensor_files import LazyTensor
from moe_dist.model.transformer import Transformer
from tests.support.family_models import reference_model, save_model
from tests.support.hugging_face_models import (
    as_documents,
    load_checkpoint,
    logits_apart,
    logits_packed,
    random_documents,
)

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "rope_theta": 300.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 300.0}
LINEAR = {"rope_type": "linear", "factor": 2.5, "rope_theta": 300.0}
CASES = {
    "llama, grouped": ("llama", {}),
    "llama, biases, llama3, tied": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3, "tie_word_embeddings": True},
    ),
    "llama, linear, one key": ("llama", {"rope_parameters": LINEAR, "num_key_value_heads": 1}),
    "llama, yarn, wide heads": ("llama", {"rope_parameters": YARN, "head_dim": 16}),
    "llama, yarn with every key": (
        "llama",
        {
            "rope_parameters": YARN
            | {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False, "mscale": 1.5, "mscale_all_dim": 0.5}
        },
    ),
    "mistral, window": ("mistral", {"sliding_window": 5}),
    "mistral, no window": ("mistral", {"sliding_window": None, "num_key_value_heads": 6}),
    "mistral, long window, tied": ("mistral", {"sliding_window": 39, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows above": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen2, yarn, tied": ("qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3, biases, wide": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3, windows": (
        "qwen3",
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 3,
            "max_window_layers": 2,
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": ("mixtral", {}),
    "mixtral, window, top-1": ("mixtral", {"sliding_window": 6, "num_experts_per_tok": 1}),
    "mixtral, tied, wide heads": ("mixtral", {"tie_word_embeddings": True, "head_dim": 16, "num_key_value_heads": 6}),
    "olmoe": ("olmoe", {}),
    "olmoe, clipped, renormalised": ("olmoe", {"clip_qkv": 0.5, "norm_topk_prob": True, "num_key_value_heads": 6}),
    "olmoe, biases, tied": ("olmoe", {"attention_bias": True, "tie_word_embeddings": True, "rope_parameters": LINEAR}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 8}),
    "qwen3_moe, sparse every other layer": (
        "qwen3_moe",
        {**EXPERTS, "head_dim": 16, "decoder_sparse_step": 2, "norm_topk_prob": True},
    ),
    "qwen3_moe, window, a dense layer": (
        "qwen3_moe",
        {
            **EXPERTS,
            "head_dim": 8,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 5,
            "attention_bias": True,
        },
    ),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 40}),
    "qwen2_moe, no biases, renormalised": (
        "qwen2_moe",
        {**EXPERTS, "shared_expert_intermediate_size": 24, "qkv_bias": False, "norm_topk_prob": True},
    ),
    "qwen2_moe, windows, dense layers": (
        "qwen2_moe",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 40,
            "mlp_only_layers": [0, 2],
            "use_sliding_window": True,
            "sliding_window": 4,
            "tie_word_embeddings": True,
        },
    ),
    "deepseek": ("deepseek", {}),
    "deepseek, two dense layers": (
        "deepseek",
        {"first_k_dense_replace": 2, "n_shared_experts": 1, "norm_topk_prob": True},
    ),
    "deepseek, one expert per token": ("deepseek", {"num_experts_per_tok": 1, "norm_topk_prob": True}),
    "deepseek, no shared expert": (
        "deepseek",
        {"n_shared_experts": None, "first_k_dense_replace": 0, "moe_layer_freq": 2, "num_key_value_heads": 6},
    ),
}
each = pytest.mark.parametrize(("kind", "changes"), CASES.values(), ids=CASES)
WRITTEN = {name: case for name, case in CASES.items() if "moe_layer_freq" not in case[1]}  # an export does not write it
exported = pytest.mark.parametrize(("kind", "changes"), WRITTEN.values(), ids=WRITTEN)


def test_every_family_has_three_cases():
    kinds = [kind for kind, _ in CASES.values()]
    assert set(kinds) == set(FAMILIES) and all(kinds.count(kind) >= 3 for kind in FAMILIES)


@each
def test_logits_equal_the_reference(kind, changes, tmp_path):
    """Documents packed into one micro-batch, against each document alone in transformers; logits of about 10."""
    theirs = save_model(kind, tmp_path / "hf", **changes)
    import_folder(tmp_path / "hf", tmp_path / "out")
    documents = random_documents()
    expected, ours = logits_apart(theirs, documents), logits_packed(load_checkpoint(tmp_path / "out"), documents)
    assert expected.abs().max() > 3
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@exported
def test_import_and_export_are_inverse_to_the_bit(kind, changes, tmp_path):
    save_model(kind, tmp_path / "hf", **changes)
    import_folder(tmp_path / "hf", tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "out", shard_bytes=40_000)
    theirs, out = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "out")
    assert out.keys() == theirs.keys()
    assert all(torch.equal(out[name], tensor) for name, tensor in theirs.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == exported_as(kind, changes)
    import_folder(tmp_path / "out", tmp_path / "again")
    assert read_state(tmp_path / "again")["config"] == read_state(tmp_path / "ours")["config"]
    ours, again = read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "again")
    assert ours.keys() == again.keys() and all(torch.equal(ours[name].read(), again[name].read()) for name in ours)


@exported
def test_the_export_computes_the_same_in_the_reference(kind, changes, tmp_path):
    theirs = save_model(kind, tmp_path / "hf", **changes)
    import_folder(tmp_path / "hf", tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "out")
    documents = random_documents()
    again = reference_model(tmp_path / "out")
    torch.testing.assert_close(logits_apart(again, documents), logits_apart(theirs, documents), rtol=0, atol=1e-5)


@each
def test_bf16_is_no_less_exact_than_the_reference(kind, changes, tmp_path):
    """The median error against float64. A mean would be that of the few tokens that go to another expert."""
    theirs = save_model(kind, tmp_path / "hf", **changes)
    for parameter in theirs.parameters():
        parameter.data = parameter.data.bfloat16().float()
    import_folder(tmp_path / "hf", tmp_path / "out")
    documents = random_documents()
    exact = logits_apart(copy.deepcopy(theirs).double(), documents)
    found = logits_packed(load_checkpoint(tmp_path / "out").bfloat16(), documents)
    errors = [(logits - exact).abs().median() for logits in (found, logits_apart(theirs.bfloat16(), documents))]
    assert 0 < errors[0] <= 1.5 * errors[1]


DENSE_TRAINED = ("llama, biases, llama3, tied", "qwen2, windows above", "qwen3, windows")
SPARSE_TRAINED = ("mixtral", "olmoe", "qwen3_moe", "qwen2_moe", "deepseek")
ROUTERS = ".mlp.gate."


@pytest.mark.parametrize(
    ("case", "trained"),
    [(case, "") for case in (*DENSE_TRAINED, *SPARSE_TRAINED)] + [(case, ROUTERS) for case in SPARSE_TRAINED],
)
def test_four_steps_of_sgd_equal_the_reference(case, trained, tmp_path):
    kind, changes = CASES[case]
    theirs = save_model(kind, tmp_path / "hf", **changes)
    import_folder(tmp_path / "hf", tmp_path / "out")
    ours = load_checkpoint(tmp_path / "out")
    for model, part in ((theirs, trained), (ours, trained and ".router.")):
        chosen = [parameter for name, parameter in model.named_parameters() if part in name]
        assert chosen
        losses = [step(model, chosen, seed) for seed in range(4)]
        if model is theirs:
            expected = losses
    assert expected[0] != expected[3]
    assert losses == pytest.approx(expected, abs=1e-5)


def step(model, parameters, seed):
    """Take a step of SGD on four documents. Return the loss before it, a mean over all predicted tokens."""
    documents = [ids for ids in random_documents(seed=seed) if len(ids) > 1]
    if isinstance(model, Transformer):
        tokens, info = as_documents(documents)
        logits = model(tokens, info).logits_TV.split([len(ids) for ids in documents])
    else:
        logits = [model(torch.tensor([ids])).logits[0] for ids in documents]
    sums = [
        F.cross_entropy(of_document[:-1], torch.tensor(ids[1:]), reduction="sum")
        for of_document, ids in zip(logits, documents, strict=True)
    ]
    loss = sum(sums) / sum(len(ids) - 1 for ids in documents)
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= 0.02 * gradient
    return loss.item()


def exported_as(kind, changes):
    """Return the model_type that an export has: the first family that can describe the model."""
    return "llama" if kind == "mistral" and changes.get("sliding_window") is None else kind


def tensors_of(folder: Path):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def swap_experts(tensors):
    """Exchange two experts' matrices, as an importer that sorts names as text would do beyond ten experts."""
    first, second = (next(name for name in tensors if name.endswith(f"experts.down[{number}]")) for number in (0, 1))
    tensors[first], tensors[second] = tensors[second], tensors[first]


def transpose_a_matrix(tensors):
    name = next(name for name, tensor in tensors.items() if name.endswith("linear_proj.weight"))
    tensor = tensors[name]
    tensors[name] = LazyTensor(tensor.shape, tensor.dtype, lambda: tensor.read().T.contiguous())


def empty(ending):
    def change(tensors):
        name = next(name for name in tensors if name.endswith(ending))
        shape, dtype = tensors[name].shape, tensors[name].dtype
        tensors[name] = LazyTensor(shape, dtype, lambda: torch.zeros(shape, dtype=dtype))

    return change


FAULTS = {
    "two experts swapped": ("mixtral", swap_experts),
    "a matrix transposed": ("llama, grouped", transpose_a_matrix),
    "an expert dropped": ("qwen3_moe", empty("experts.gate_up[5]")),
    "a bias missing": ("qwen2", empty("linear_qkv.bias")),
}


@pytest.mark.parametrize(("case", "fault"), FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_caught(case, fault, monkeypatch, tmp_path):
    """The comparison of logits above fails if the import makes this mistake."""
    original = pretrained.from_theirs

    def faulty(*arguments):
        tensors = original(*arguments)
        fault(tensors)
        return tensors

    monkeypatch.setattr(pretrained, "from_theirs", faulty)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        test_logits_equal_the_reference(*CASES[case], tmp_path)
