"""The recipes of published models: their exact number of parameters, and the model that their config.json describes."""

import pytest
import torch

from moe_dist.config.recipe import load_config
from moe_dist.convert.families.family_registry import family_of
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout
from tests.support import ROOT

LLAMA_3_1 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PUBLISHED = {  # the recipe: the keys of the model's config.json that describe it, and its number of parameters
    "tune_mixtral_8x7b": (
        {
            "model_type": "mixtral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "vocab_size": 32000,
        },
        46_702_792_704,
    ),
    "tune_olmoe_1b_7b": (
        {
            "model_type": "olmoe",
            "clip_qkv": None,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 16,
            "num_key_value_heads": 16,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "vocab_size": 50304,
        },
        6_919_161_856,
    ),
    "tune_qwen3_30b_a3b": (
        {
            "model_type": "qwen3_moe",
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        30_532_122_624,
    ),
    "tune_deepseek_moe_16b": (
        {
            "model_type": "deepseek",
            "attention_bias": False,
            "first_k_dense_replace": 1,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "moe_layer_freq": 1,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 28,
            "num_key_value_heads": 16,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000,
            "scoring_func": "softmax",
            "vocab_size": 102400,
        },
        16_375_728_128,
    ),
    "tune_llama_3_1_8b": (
        {
            "model_type": "llama",
            "attention_bias": False,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_scaling": LLAMA_3_1 | {"original_max_position_embeddings": 8192},
            "rope_theta": 500000.0,
            "vocab_size": 128256,
        },
        8_030_261_248,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_model(name):
    raw, parameters = PUBLISHED[name]
    recipe = load_config(ROOT / "configs" / f"{name}.yaml").model
    model, vocab_size = family_of(raw, "config.json").model_section(raw, "config.json")
    described = {**model.model_dump(), "recompute": True, "num_query_groups": model.query_groups}
    assert {**recipe.model_dump(), "num_query_groups": recipe.query_groups} == described
    with torch.device("meta"):
        built = Transformer(recipe, vocab_size, Layout(), seed=0)
    assert built.num_parameters() == sum(parameter.numel() for parameter in built.parameters()) == parameters
