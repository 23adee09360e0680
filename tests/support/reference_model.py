"""The model in plain PyTorch, document by document, from a dict of the real model's parameters.

It uses nothing of moe_dist or megatron: only the formulas of the papers, written as simply as possible. The caller
supplies expert layers (tests/support/routing_reference.py).
"""

import math

import torch


def attention(x, weights, *, num_heads, base, epsilon, groups=None, delta=None, position=None, clip=None, window=None):
    """Attention over one document x [L, D]. Weights: qkv in megatron's order (of each group: its heads' queries, a key,
    a value), proj, norms and biases. Head h reads the key and value of group h // (heads per group).

    position [L]: the tokens' positions; default 0, 1, 2, ... delta(part, x): LoRA's addition to all queries "q", keys
    "k" and values "v", head after head, and to the output "o". A token sees the last `window` tokens, itself included.
    """
    length, groups = len(x), groups or num_heads
    shared = num_heads // groups
    size = len(weights["linear_qkv.weight"]) // (num_heads + 2 * groups)
    mixed = x @ weights["linear_qkv.weight"].T + weights.get("linear_qkv.bias", 0)
    mixed = mixed.view(length, groups, shared + 2, size)
    query, key, value = mixed[:, :, :shared].flatten(1, 2), mixed[:, :, shared], mixed[:, :, shared + 1]
    if delta:
        query, key, value = (y + delta(part, x).view_as(y) for part, y in zip("qkv", (query, key, value)))
    query, key = (head_norm(y, weights, f"{part}_layernorm", epsilon) for part, y in (("q", query), ("k", key)))
    if clip:
        query, key, value = (torch.where(y.abs() > clip, y.sign() * clip, y) for y in (query, key, value))
    position = torch.arange(length) if position is None else position
    query, key = rotate(query, base, position), rotate(key, base, position)
    rows = []
    for t in range(length):
        heads = []
        for h in range(num_heads):
            seen = slice(max(0, t + 1 - window) if window else 0, t + 1)
            scores = key[seen, h // shared] @ query[t, h] / math.sqrt(size)
            heads.append(torch.softmax(scores, dim=0) @ value[seen, h // shared])
        rows.append(torch.cat(heads))
    attended = torch.stack(rows)
    output = attended @ weights["linear_proj.weight"].T + weights.get("linear_proj.bias", 0)
    return output + (delta("o", attended) if delta else 0)


def head_norm(x, weights, name, epsilon):
    """Normalise the heads of x [L, H, d], if there are weights for it: of each head, or of all heads together."""
    if f"{name}.weight" not in weights:
        return x
    weight = weights[f"{name}.weight"]
    if f"{name}.bias" in weights:
        return layer_norm(x, weight, weights[f"{name}.bias"], epsilon)
    return rms_norm(x.reshape(len(x), -1, len(weight)), weight, epsilon).view_as(x)


def rotate(x, base, position):
    """Apply RoPE with the two halves of a head as real and imaginary part. Angles in float32."""
    size = x.shape[2]
    frequency = 1 / base ** (torch.arange(0, size, 2) / size)
    angle = torch.outer(position.float(), frequency)
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
    """Return logits [L, V] of one document. ffn(layer, x) is its feed-forward part; the default is the dense one."""
    x = parameters["embedding.weight"][tokens]
    for layer in range(config.num_layers):
        own = {k.removeprefix(f"layers.{layer}."): v for k, v in parameters.items() if k.startswith(f"layers.{layer}.")}
        core = {k.removeprefix("attention.core."): v for k, v in own.items()}

        def attend(x, core=core):
            settings = {"num_heads": config.num_heads, "groups": config.num_query_groups, "base": config.rope_base}
            return attention(x, core, epsilon=config.norm_epsilon, **settings)

        def feed(x, own=own, layer=layer):
            return ffn(layer, x) if ffn else swiglu(x, own["ffn.gate_up.weight"], own["ffn.down.weight"])

        for branch, weight in ((attend, own["attention_norm.weight"]), (feed, own["ffn_norm.weight"])):
            if config.norm == "swin":
                x = x + rms_norm(branch(x), weight, config.norm_epsilon)
            else:
                x = x + branch(rms_norm(x, weight, config.norm_epsilon))
    output = parameters["embedding.weight" if config.tie_embeddings else "output.weight"]
    return rms_norm(x, parameters["norm.weight"], config.norm_epsilon) @ output.T
