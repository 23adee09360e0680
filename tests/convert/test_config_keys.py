"""Keys that config.json omits or has in unusual forms: the model is the one that transformers builds."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_dist.checkpoint.checkpoint import read_state
from moe_dist.config.model_section import ModelConfig
from moe_dist.convert.families.family_registry import FAMILIES, family_for
from moe_dist.convert.hugging_face import export_folder, import_folder
from moe_dist.core.errors import UserError
from tests.data.tokenizers.test_hugging_face_text import save as save_tokenizer
from tests.support.family_models import save_model
from tests.support.hugging_face_models import (
    load_checkpoint,
    logits_apart,
    logits_packed,
    random_documents,
)

# 96 heads: a multiple of every family's default number of key-value heads. 32 layers: more than max_window_layers.
NEEDED = {
    "vocab_size": 64,
    "hidden_size": 6144,
    "intermediate_size": 80,
    "num_hidden_layers": 32,
    "num_attention_heads": 96,
}
LINEAR = {"type": "linear", "factor": 2.0}
FORMS = {
    "no other key": {},
    "empty": {"rope_scaling": None, "rope_parameters": None, "mlp_only_layers": None, "layer_types": None},
    "windows": {"use_sliding_window": True},
    "windows without a size": {"use_sliding_window": True, "sliding_window": None},
    "the old key type": {"rope_scaling": LINEAR},
    "base in rope_scaling": {"rope_scaling": {**LINEAR, "rope_theta": 77.0}},
    "base in both places": {"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 9.0}},
    "base beside rope_parameters": {"rope_theta": 5.0, "rope_parameters": {"rope_type": "default"}},
    "rope_scaling added to rope_parameters": {
        "rope_theta": 7.0,
        "rope_scaling": LINEAR,
        "rope_parameters": {"rope_type": "yarn", "factor": 3.0, "rope_theta": 9.0},
    },
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != "deepseek"])
def test_settings_are_those_of_transformers(kind, form):
    expected = AutoConfig.for_model(kind, **json.loads(json.dumps(NEEDED | form)))
    model, _ = FAMILIES[kind].model_section(NEEDED | form, "test")
    assert settings_of(model) == settings_in(expected)


def settings_of(model: ModelConfig) -> dict:
    scaling = model.rope_scaling
    found = {
        "groups": model.query_groups,
        "head_size": model.size_per_head,
        "epsilon": model.norm_epsilon,
        "rope": (model.rope_base, scaling.type if scaling else "default", scaling.factor if scaling else None),
        "tied": model.tie_embeddings,
        "std": model.init_std,
        "windows": [model.window_of(layer) for layer in range(model.num_layers)],
    }
    if model.ffn.type == "moe":
        router, shared = model.ffn.router, model.ffn.shared_expert
        found["router"] = (router.num_experts, router.top_k, router.renormalize)
        found["widths"] = (model.ffn.hidden_size, shared and shared.hidden_size)
        found["sparse"] = list(model.expert_layers)
    return found


def settings_in(config) -> dict:
    """Return the same settings as settings_of, read from transformers' configuration."""
    layers = range(config.num_hidden_layers)
    rope, window = config.rope_parameters, getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(layers)
    found = {
        "groups": config.num_key_value_heads,
        "head_size": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "epsilon": config.rms_norm_eps,
        "rope": (rope["rope_theta"], rope["rope_type"], rope.get("factor")),
        "tied": config.tie_word_embeddings,
        "std": config.initializer_range,
        "windows": [window if kind == "sliding_attention" else 0 for kind in kinds],
    }
    if hasattr(config, "num_experts_per_tok"):
        renormalized = getattr(config, "norm_topk_prob", True)  # Mixtral always renormalises
        found["router"] = (config.num_experts, config.num_experts_per_tok, renormalized)
        width = getattr(config, "moe_intermediate_size", config.intermediate_size)
        found["widths"] = (width, getattr(config, "shared_expert_intermediate_size", None))
        dense, step = getattr(config, "mlp_only_layers", None) or (), getattr(config, "decoder_sparse_step", 1)
        found["sparse"] = [layer for layer in layers if layer not in dense and not (layer + 1) % step]
    return found


YARN = {"rope_type": "yarn", "factor": 4.0}
EDITS = {
    "base in rope_scaling": {"rope_scaling": {**LINEAR, "rope_theta": 77.0}},
    "yarn from max_position_embeddings": {"rope_scaling": YARN, "max_position_embeddings": 16},
    "yarn with a length outside of rope_scaling": {
        "rope_scaling": {**YARN, "original_max_position_embeddings": 64},
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 8,
    },
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_logits_with_an_edited_rotary_embedding(edit, tmp_path):
    """The config.json is edited by hand, as users do for longer contexts; transformers reads it again."""
    save_model("llama", tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | edit))
    import_folder(tmp_path / "hf", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").eval()
    documents = random_documents()
    expected, ours = logits_apart(theirs, documents), logits_packed(load_checkpoint(tmp_path / "out"), documents)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


REFUSED = {
    "unknown layer types": (
        {"layer_types": ["full_attention", "chunked_attention", "full_attention"]},
        "layer_types must be full_attention or sliding_attention for each of its layers",
    ),
    "too few layer types": (
        {"layer_types": ["full_attention"]},
        "layer_types must be full_attention or sliding_attention for each of its layers",
    ),
    "rotation of each layer type": (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        "rope_parameters has settings for each type of layer, which is not supported",
    ),
}


@pytest.mark.parametrize(("form", "sentence"), REFUSED.values(), ids=REFUSED)
def test_forms_that_are_refused(form, sentence):
    with pytest.raises(UserError, match=sentence):
        FAMILIES["qwen2"].model_section(NEEDED | {"num_hidden_layers": 3} | form, "test")


@pytest.mark.parametrize("kind", ["olmoe", "deepseek"])
def test_wide_heads_of_a_family_without_head_dim(kind):
    """transformers' OLMoE and DeepSeek's own code could not load such an export."""
    sizes = NEEDED | {
        "moe_intermediate_size": 24,
        "n_routed_experts": 6,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
    }
    model, _ = FAMILIES[kind].model_section(sizes, "test")
    assert family_for(model, 64, "test")[0].model_type == kind
    with pytest.raises(UserError, match="test has no Hugging Face architecture: model"):
        family_for(model.model_copy(update={"head_size": 128}), 64, "test")


@pytest.mark.parametrize("kind", ["llama", "olmoe"])
def test_a_padded_vocabulary_is_exported_and_imported_again(kind, tmp_path):
    """The tokenizer has 300 ids, the embedding 320 rows, as in most published models."""
    save_model(kind, tmp_path / "hf", vocab_size=320, bos_token_id=None, eos_token_id=None)
    save_tokenizer(tmp_path / "hf", bos_token="<|start|>", eos_token="<|end|>")
    import_folder(tmp_path / "hf", tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "exported")
    import_folder(tmp_path / "exported", tmp_path / "again")
    settings = read_state(tmp_path / "ours")["config"]
    assert settings["model"]["vocab_size"] == 320 and read_state(tmp_path / "again")["config"] == settings
    documents = random_documents(300)
    ours, again = (logits_packed(load_checkpoint(tmp_path / name), documents) for name in ("ours", "again"))
    assert torch.equal(ours, again)
