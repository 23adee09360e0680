"""A model with mixture-of-depths in plain PyTorch: loops over layers, competing sets and documents.

Shape suffixes: T tokens, D model width.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from moe_dist.core.batch import MODALITIES
from tests.support import reference_model
from tests.support import routing_reference as reference


def competing_sets(info, scope):
    """Return lists of the valid tokens that compete with each other."""
    everyone = range(len(MODALITIES))
    if scope == "modality":
        return [group for modality in everyone for group in reference.groups_of(info, [modality])]
    if scope == "sequence":
        size = info.num_tokens // len(info.sequence_counts)
        runs = [range(start, start + size) for start in range(0, info.num_tokens, size)]
        return [[t for t in run if bool(info.valid_T[t])] for run in runs]
    return reference.groups_of(info, everyone)


def transformer(batch, parameters, model):
    """Return logits [T, V], and for each layer with mixture-of-depths the set of admitted tokens.

    parameters: copies of the model's, by name. Only the routers' settings are read from the model itself.
    """
    config, info = model.config, batch.info
    x_TD, admissions = parameters["embedding.weight"][batch.tokens_T], {}
    for layer in range(config.num_layers):
        tokens, gate_T = set(range(info.num_tokens)), None
        if layer in config.depth_layers:
            router = model.depth[str(layer)].router
            logits_T = (x_TD * parameters[f"depth.{layer}.router.gate.weight"][0]).sum(1)
            sets = competing_sets(info, config.depth.scope)
            tokens = reference.admitted(logits_T.tolist(), info, sets, router.key, config.depth.capacity)
            gate_T, admissions[layer] = 1 / (1 + torch.exp(-logits_T)), tokens
        y_TD = block(layer, x_TD, tokens, info, parameters, model)
        rows = []
        for t in range(info.num_tokens):
            if t not in tokens:
                rows.append(x_TD[t])
            else:
                rows.append(y_TD[t] if gate_T is None else x_TD[t] + gate_T[t] * (y_TD[t] - x_TD[t]))
        x_TD = torch.stack(rows)
    x_TD = reference_model.rms_norm(x_TD, parameters["norm.weight"], config.norm_epsilon)
    return x_TD @ parameters["output.weight"].T, admissions


def block(layer, x_TD, tokens, info, parameters, model):
    """Apply a Swin block to some of the tokens. The rows of all other tokens have no meaning."""
    config, prefix = model.config, f"layers.{layer}."
    own = {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}
    core = {name.removeprefix("attention.core."): value for name, value in own.items()}
    rows = list(torch.zeros_like(x_TD))
    for document in range(len(info.document_lengths)):
        members = [t for t in sorted(tokens) if int(info.document_T[t]) == document]
        if members:
            position = info.position_T[torch.tensor(members)]
            attended = reference_model.attention(
                torch.stack([x_TD[t] for t in members]),
                core,
                num_heads=config.num_heads,
                base=config.rope_base,
                epsilon=config.norm_epsilon,
                position=position,
            )
            for t, row in zip(members, attended):
                rows[t] = row
    h_TD = x_TD + reference_model.rms_norm(torch.stack(rows), own["attention_norm.weight"], config.norm_epsilon)
    if "ffn.down.weight" in own:
        y_TD = reference_model.swiglu(h_TD, own["ffn.gate_up.weight"], own["ffn.down.weight"])
    else:
        seen_T = torch.tensor([t in tokens for t in range(info.num_tokens)]) & info.valid_T
        gate_weights = [value for name, value in own.items() if name.startswith("ffn.router.")]
        gates_TE = reference.gates(model.layers[layer].ffn.router, h_TD, gate_weights, replace(info, valid_T=seen_T))
        y_TD = reference.expert_layer(h_TD, gates_TE, own["ffn.experts.gate_up"], own["ffn.experts.down"])
    return h_TD + reference_model.rms_norm(y_TD, own["ffn_norm.weight"], config.norm_epsilon)
