"""Random micro-batches for model tests, and small recipes to run them with."""

import torch

from moe_dist.config.model_section import ModelConfig
from moe_dist.core.batch import Batch, TokenInfo
from moe_dist.core.strict import validate

VOCAB = 50
DENSE = {"type": "dense", "hidden_size": 48}
TOP_K = {"type": "moe", "hidden_size": 48, "router": {"type": "top_k", "num_experts": 4, "top_k": 2}}
LORA = {"rank": 8, "alpha": 16.0}
LORA_EXPERTS = {
    "type": "moe",
    "hidden_size": 48,
    "experts": {"type": "lora", **LORA},
    "router": {"type": "top_k", "num_experts": 3, "top_k": 1, "weighting": "straight_through"},
}
EXPERT_CHOICE = {"type": "moe", "hidden_size": 48, "router": {"type": "expert_choice", "num_experts": 4}}
LLAMA = {"norm": "pre", "qk_norm": False, "num_query_groups": 2, "head_size": 4, "rope_base": 100.0}
MOMA = {
    "type": "moe",
    "hidden_size": 48,
    "router": {
        "type": "modality",
        "text": {"type": "expert_choice", "num_experts": 4},
        "image": {"type": "expert_choice", "num_experts": 4},
    },
}


def model_config(ffn=DENSE, **changes) -> ModelConfig:
    sizes = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "init_std": 0.1}
    return validate(ModelConfig, {**sizes, "ffn": ffn, **changes}, "test")


def make_batch(lengths, *, num_groups=1, num_sequences=None, padding=0, seed=0, first_token_id=0) -> Batch:
    """Return documents of these lengths, then one document of padding. Padding does not change the other documents."""
    modalities, vocabulary = (torch.Generator().manual_seed(seed + offset) for offset in (0, 1000))
    documents = [*lengths, padding] if padding else list(lengths)
    tokens = sum(documents)
    position_T = torch.cat([torch.arange(length) for length in documents])
    valid_T = torch.arange(tokens) < tokens - padding
    last_T = torch.cat([torch.arange(length) == length - 1 for length in documents])
    info = TokenInfo.build(
        modality_T=torch.randint(2, (tokens,), generator=modalities),
        valid_T=valid_T,
        position_T=position_T,
        token_id_T=torch.arange(tokens) + first_token_id,
        document_lengths=documents,
        num_groups=num_groups,
        num_sequences=num_sequences,
    )
    tokens_T = torch.randint(VOCAB, (tokens,), generator=vocabulary)
    return Batch(
        tokens_T=tokens_T,
        targets_T=tokens_T.roll(-1),
        loss_mask_T=valid_T & ~last_T,
        target_modality_T=info.modality_T.roll(-1),
        info=info,
    )
