"""The model in plain PyTorch, document by document, from a dict of the real model's parameters.

Nothing of moe_dist or megatron is used: the formulas of the papers, written as simply as possible. Expert layers are
the caller's (tests/reference.py).
"""

import math

import torch


def attention(x, weights, *, num_heads, base, epsilon):
    """One document x [L, D]; weights: qkv [3D, D] in megatron's order (per head: query, key, value), proj, norms."""
    length, width = x.shape
    size = width // num_heads
    query, key, value = (x @ weights["linear_qkv.weight"].T).view(length, num_heads, 3, size).unbind(2)
    if "q_layernorm.weight" in weights:
        query = layer_norm(query, weights["q_layernorm.weight"], weights["q_layernorm.bias"], epsilon)
        key = layer_norm(key, weights["k_layernorm.weight"], weights["k_layernorm.bias"], epsilon)
    query, key = rotate(query, base), rotate(key, base)
    rows = []
    for t in range(length):
        heads = []
        for h in range(num_heads):
            scores = key[: t + 1, h] @ query[t, h] / math.sqrt(size)
            heads.append(torch.softmax(scores, dim=0) @ value[: t + 1, h])
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ weights["linear_proj.weight"].T


def rotate(x, base):
    """RoPE with the two halves of a head as real and imaginary part; positions count from 0. Angles in float32."""
    length, _, size = x.shape
    frequency = torch.tensor([base ** (-2 * i / size) for i in range(size // 2)], dtype=torch.float32)
    angle = torch.outer(torch.arange(length).float(), frequency)
    turn = torch.complex(angle.cos().double(), angle.sin().double())[:, None, :]
    real, imaginary = x.chunk(2, dim=-1)
    turned = torch.complex(real, imaginary) * turn
    return torch.cat([turned.real, turned.imag], dim=-1)


def layer_norm(x, weight, bias, epsilon):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + epsilon) * weight + bias


def rms_norm(x, weight, epsilon):
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight


def swiglu(x, gate_up, down):
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up) @ down.T


def transformer(tokens, parameters, config, ffn=None):
    """Logits [L, V] of one document alone. ffn(layer, x) is its feed-forward part; the default is the dense one."""
    x = parameters["embedding.weight"][tokens]
    for layer in range(config.num_layers):
        own = {k.removeprefix(f"layers.{layer}."): v for k, v in parameters.items() if k.startswith(f"layers.{layer}.")}
        core = {k.removeprefix("attention.core."): v for k, v in own.items()}

        def attend(x, core=core):
            return attention(x, core, num_heads=config.num_heads, base=config.rope_base, epsilon=config.norm_epsilon)

        def feed(x, own=own, layer=layer):
            return ffn(layer, x) if ffn else swiglu(x, own["ffn.gate_up.weight"], own["ffn.down.weight"])

        for branch, weight in ((attend, own["attention_norm.weight"]), (feed, own["ffn_norm.weight"])):
            if config.norm == "swin":
                x = x + rms_norm(branch(x), weight, config.norm_epsilon)
            else:
                x = x + branch(rms_norm(x, weight, config.norm_epsilon))
    return rms_norm(x, parameters["norm.weight"], config.norm_epsilon) @ parameters["output.weight"].T
