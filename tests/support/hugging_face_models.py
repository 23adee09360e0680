"""Random small Llamas as Hugging Face folders, and our checkpoints as models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from moe_dist.checkpoint.checkpoint import read_state
from moe_dist.checkpoint.stored_weights import read_tensors
from moe_dist.config.model_section import ModelConfig
from moe_dist.core.batch import TokenInfo
from moe_dist.core.strict import validate
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout

SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-4,
    "rope_theta": 300.0,
    "initializer_range": 0.3,
}


def save_llama(folder: Path, *, dtype=torch.float32, max_shard_size="1GB", **changes) -> LlamaForCausalLM:
    """Write a random model with transformers. Its norms' weights are random too, so that each affects the result.

    It computes in float32, with weights that `dtype` represents exactly.
    """
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(SIZES | changes))).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
        parameter.data = parameter.data.to(dtype).float()
    stored = {
        name: parameter.to(dtype) for name, parameter in model.named_parameters()
    }  # a shared parameter is stored once
    model.save_pretrained(folder, state_dict=stored, max_shard_size=max_shard_size)
    return model


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a folder with a single weight file. change: called with all tensors by name."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def load_checkpoint(path: Path) -> Transformer:
    """Load the whole model of a checkpoint on one process. Every parameter must be filled, and every tensor used."""
    tensors = {name: lazy.read() for name, lazy in read_tensors(path).items()}
    section = validate(ModelConfig, read_state(path)["config"]["model"], "test")
    model = Transformer(section, len(tensors["embedding.weight"]), Layout(), seed=99)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            experts = getattr(parameter, "expert_ids", None)
            targets = {name: parameter} if experts is None else {f"{name}[{e}]": parameter[e] for e in experts}
            for key, target in targets.items():
                target.copy_(tensors.pop(key))
    assert not tensors, f"not used: {list(tensors)}"
    return model


def as_documents(documents: list[list[int]]) -> tuple[Tensor, TokenInfo]:
    """Pack the token ids of several documents into one micro-batch of text."""
    lengths = [len(ids) for ids in documents]
    tokens = sum(lengths)
    info = TokenInfo.build(
        modality_T=torch.zeros(tokens, dtype=torch.int64),
        valid_T=torch.ones(tokens, dtype=torch.bool),
        position_T=torch.cat([torch.arange(length) for length in lengths]),
        token_id_T=torch.arange(tokens),
        document_lengths=lengths,
        num_groups=1,
    )
    return torch.tensor([token for ids in documents for token in ids]), info


@torch.no_grad()
def logits_apart(model: LlamaForCausalLM, documents: list[list[int]]) -> Tensor:
    """Return transformers' logits of each document, computed one after another."""
    return torch.cat([model(torch.tensor([ids])).logits[0] for ids in documents])


@torch.no_grad()
def logits_packed(model: Transformer, documents: list[list[int]]) -> Tensor:
    return model(*as_documents(documents)).logits_TV


def random_documents(vocabulary: int = 64, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in (9, 1, 40, 17)]
