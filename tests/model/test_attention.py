"""Attention over packed documents against the naive formula, each document on its own."""

import math

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from pydantic import TypeAdapter

from moe_dist.config.rope_scaling import RopeScaling
from moe_dist.model import attention
from moe_dist.model.attention import BucketedDocuments, VarlenDocuments, locate_documents
from moe_dist.model.mcore import Attention
from moe_dist.model.rope import frequencies, rotary_angles, rotate, rotation, rotation_of
from moe_dist.model.site import block_site
from tests.support import reference_model
from tests.support import routing_reference as reference
from tests.support.model_batches import model_config

LENGTHS = [1, 7, 40, 16, 17, 1, 33, 40, 5]


def positions(lengths):
    return torch.cat([torch.arange(length) for length in lengths])


SETTINGS = {
    "chameleon": {},
    "no norm": {"qk_norm": "none"},
    "layer norm, shared keys": {"num_query_groups": 2},
    "one key, narrow heads": {"qk_norm": "none", "num_query_groups": 1, "head_size": 4},
    "biases, rms norm": {"qk_norm": "rms_norm", "attention_bias": "all", "num_query_groups": 2},
    "biases of q, k and v": {"qk_norm": "none", "attention_bias": "qkv"},
    "rms norm of all heads, clipped": {"qk_norm": "rms_norm_full", "clip_qkv": 0.7, "num_query_groups": 2},
    "window": {"sliding_window": 5, "num_query_groups": 2},
    "window of one token": {"sliding_window": 1},
    "window as long as a document": {"sliding_window": 40},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("lengths", [LENGTHS, [1], [64], [3, 3, 3]], ids=str)
def test_attention_equals_the_naive_formula_in_float64(lengths, settings):
    """Cases include keys and values shared by 2 or all 4 heads, and heads narrower than their share of the width."""
    torch.manual_seed(0)
    config = model_config(**{"rope_base": 100.0, "head_size": 8} | settings)
    size, groups = config.size_per_head, config.query_groups
    module = Attention(config, block_site(config, 0, seed=3).child("attention")).double()
    for parameter in module.parameters():  # norms too must matter
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(sum(lengths), config.hidden_size, dtype=torch.float64, requires_grad=True)
    documents = locate_documents(lengths, device=x.device, dtype=x.dtype)
    turn = rotation(rotary_angles(positions(lengths), head_size=size, base=100.0), torch.float64)
    upstream = torch.randn_like(x)

    output = module(x, torch.arange(len(x)), documents, turn)
    names, parameters = zip(*module.core.named_parameters())
    gradients = torch.autograd.grad(output, [x, *parameters], upstream)

    weights = dict(zip(names, parameters))
    settings = {"num_heads": config.num_heads, "groups": groups, "base": 100.0, "epsilon": config.norm_epsilon}
    settings |= {"clip": config.clip_qkv, "window": config.sliding_window}
    expected = torch.cat([reference_model.attention(piece, weights, **settings) for piece in x.split(lengths)])
    expected_gradients = torch.autograd.grad(expected, [x, *parameters], upstream, allow_unused=True)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(gradients, expected_gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("qk_norm", "groups", "size"), [(True, None, 8), (False, 2, 4)], ids=str)
def test_lora_on_attention_equals_the_naive_formula_in_float64(qk_norm, groups, size, dropout):
    """Each projection has its own delta and dropout mask; the base is frozen."""
    lora = {"rank": 5, "alpha": reference.LORA_ALPHA, "dropout": dropout}
    config = model_config(qk_norm=qk_norm, rope_base=100.0, num_query_groups=groups, head_size=size, lora=lora)
    module = Attention(config, block_site(config, 0, seed=3).child("attention")).double()
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    lengths, ids = [7, 16, 17], 500 + torch.arange(40)
    x = torch.randn(40, config.hidden_size, dtype=torch.float64, requires_grad=True)
    documents = locate_documents(lengths, device=x.device, dtype=x.dtype)
    upstream = torch.randn_like(x)

    turn = rotation(rotary_angles(positions(lengths), head_size=size, base=100.0), torch.float64)
    output = module(x, ids, documents, turn)
    weights = dict(module.core.named_parameters())
    frozen = {name for name, weight in weights.items() if not weight.requires_grad}
    assert frozen == {"linear_qkv.weight", "linear_proj.weight"}
    trained = [weight for weight in weights.values() if weight.requires_grad]
    gradients = torch.autograd.grad(output, [x, *trained], upstream)

    def attend(piece, piece_ids):
        def delta(part, x):
            projection = "linear_proj" if part == "o" else "linear_qkv"
            adapter = getattr(module.core, projection).lora[part]
            rows = [reference.dropped(row, adapter.key, int(i), dropout) for row, i in zip(x, piece_ids)]
            a, b = (weights[f"{projection}.lora.{part}.{key}"] for key in "ab")
            return reference.LORA_ALPHA / 5 * (torch.stack(rows) @ a) @ b

        settings = {"num_heads": config.num_heads, "groups": groups, "base": 100.0, "epsilon": config.norm_epsilon}
        return reference_model.attention(piece, weights, **settings, delta=delta)

    expected = torch.cat([attend(*pieces) for pieces in zip(x.split(lengths), ids.split(lengths))])
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, [x, *trained], upstream)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    repeated = module(x, ids, documents, turn)
    assert torch.equal(repeated, output)
    evaluated = module.eval()(x, ids, documents, turn)
    assert (evaluated - output).abs().max() > 0.1 if dropout else torch.equal(evaluated, output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_has_the_bits_of_megatron(dtype):
    """Computing cosines and sines once per micro-batch changes no bit of the values or gradients."""
    angles = rotary_angles(positions([40, 60]), head_size=16, base=100.0)
    x, upstream = (torch.randn(100, 3, 16).to(dtype) for _ in range(2))
    results = []
    for turned in (
        lambda x: rotate(x, *rotation(angles, dtype).unbind()),
        lambda x: _apply_rotary_pos_emb_bshd(x.unsqueeze(1), angles).squeeze(1),
    ):
        leaf = x.clone().requires_grad_()
        y = turned(leaf)
        results.append((y, *torch.autograd.grad(y, leaf, upstream)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results))


def scaled(kind, **settings):
    return TypeAdapter(RopeScaling).validate_python({"type": kind, **settings})


def turns_in_context(frequency, context):
    return context * frequency / (2 * math.pi)


def linear(frequency):
    return frequency / 4


def llama3(frequency):
    """Keep what turns more than 4 times in 64 tokens, divide by 8 what turns less than once, blend in between."""
    turns = turns_in_context(frequency, 64)
    if turns >= 4:
        return frequency
    if turns <= 1:
        return frequency / 8
    share = (turns - 1) / (4 - 1)
    return share * frequency + (1 - share) * frequency / 8


def yarn(frequency):
    """Without rounding, the ramp over dimensions is one over the logarithm of the turns: keep from 4 turns in 64
    tokens, divide by 4 up to half a turn."""
    turns = turns_in_context(frequency, 64)
    share = (math.log(turns) - math.log(0.5)) / (math.log(4) - math.log(0.5))
    share = min(max(share, 0), 1)
    return share * frequency + (1 - share) * frequency / 4


SCALINGS = {
    "linear": (scaled("linear", factor=4.0), linear, 1.0),
    "llama3": (
        scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
        llama3,
        1.0,
    ),
    "yarn": (
        scaled("yarn", factor=4.0, beta_fast=4.0, beta_slow=0.5, truncate=False, original_max_position_embeddings=64),
        yarn,
        0.1 * math.log(4) + 1,
    ),
}


@pytest.mark.parametrize(("scaling", "formula", "factor"), SCALINGS.values(), ids=SCALINGS)
def test_a_scaling_changes_every_frequency_as_its_paper_says(scaling, formula, factor):
    plain = [1000.0 ** (-2 * i / 64) for i in range(32)]
    expected = [formula(frequency) for frequency in plain]
    found = frequencies(64, 1000.0, scaling, torch.device("cpu"))
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-5, atol=0)
    kept, divided = (sum(new == pytest.approx(old * by) for old, new in zip(plain, expected)) for by in (1, 1 / 4))
    assert scaling.type == "linear" or (kept > 3 and len(plain) - kept - divided > 3)
    config = model_config(rope_scaling=scaling.model_dump(), rope_base=1000.0, head_size=64)
    turn = rotation_of(config, torch.tensor([0, 3]), torch.float32)
    angle = 3 * torch.cat([found, found])
    torch.testing.assert_close(turn[0, 1, 0], angle.cos() * factor)
    torch.testing.assert_close(turn[1, 1, 0], angle.sin() * factor * torch.cat([-torch.ones(32), torch.ones(32)]))


def test_rotary_angles_are_float32_and_the_plain_formula():
    angles = rotary_angles(torch.tensor([0, 1, 0, 4095]), head_size=8, base=10000.0)
    assert angles.dtype == torch.float32 and angles.shape == (4, 1, 1, 8)
    for row, position in zip(angles.flatten(1), [0, 1, 0, 4095]):
        for column in range(8):
            assert row[column].item() == pytest.approx(position * 10000.0 ** (-2 * (column % 4) / 8), rel=1e-6)


def test_buckets_hold_every_token_once_and_depend_on_lengths_alone():
    documents = BucketedDocuments.build(LENGTHS, torch.device("cpu"))
    assert torch.equal(documents.gather_P[documents.scatter_T], torch.arange(sum(LENGTHS)))
    assert dict((padded, count) for count, padded in documents.buckets) == {16: 5, 32: 1, 48: 3}
    assert sum(count * padded for count, padded in documents.buckets) == documents.gather_P.numel()


def test_far_away_values_do_not_leak_between_documents():
    """A non-finite value affects only its own document. With a dense mask, zero times it would be NaN."""
    lengths = [5, 6, 7]
    qkv = [torch.randn(18, 2, 4) for _ in range(3)]
    qkv[2][7] = torch.inf
    output = locate_documents(lengths, device=torch.device("cpu"), dtype=torch.float32).attend(*qkv)
    finite_T = output.isfinite().flatten(1).all(dim=1)
    assert finite_T[:5].all() and finite_T[11:].all() and not finite_T[7:11].any()


@pytest.mark.parametrize("torch_version", ["2.11", "2.12"])
@pytest.mark.parametrize("groups", [2, 1])
def test_cuda_in_half_precision_calls_flash_attention_by_cumulative_lengths(groups, torch_version, monkeypatch):
    """The kernel needs a GPU, so a stand-in with the same call computes what the documentation of varlen_attn says.

    torch 2.11 has no parameter enable_gqa and groups heads without it. torch 2.12 needs it for grouped heads.
    """

    def torch_2_11(query, key, value, ends_q, ends_k, longest_q, longest_k, *, window_size):
        assert window_size == (-1, 0) and longest_q == longest_k == max(LENGTHS)
        assert ends_q.dtype == torch.int32 and torch.equal(ends_q, ends_k) and ends_q[0] == 0
        key, value = (x.repeat_interleave(2 // groups, dim=1) for x in (key, value))
        pieces = [x.split(ends_q.diff().tolist()) for x in (query, key, value)]
        outputs = []
        for q, k, v in zip(*pieces):
            scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
            later = torch.ones(scores.shape[1:]).triu(1).bool()
            outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), v))
        return torch.cat(outputs)

    def torch_2_12(query, key, value, *lengths, window_size, enable_gqa=False):
        assert enable_gqa == (groups != 2)
        return torch_2_11(query, key, value, *lengths, window_size=window_size)

    monkeypatch.setattr(attention, "varlen_attn", {"2.11": torch_2_11, "2.12": torch_2_12}[torch_version])
    qkv = [torch.randn(sum(LENGTHS), heads, 4) for heads in (2, groups, groups)]
    ours = VarlenDocuments.build(LENGTHS, torch.device("cpu")).attend(*qkv)
    bucketed = BucketedDocuments.build(LENGTHS, torch.device("cpu")).attend(*qkv)
    torch.testing.assert_close(ours, bucketed)


def test_the_call_of_flash_attention_fits_its_real_signature():
    """The real operator runs on the meta device, with shapes and dtypes only, forward and backward."""
    meta = torch.device("meta")
    settings = {"dtype": torch.bfloat16, "device": meta, "requires_grad": True}
    qkv = [torch.empty(sum(LENGTHS), heads, 8, **settings) for heads in (4, 2, 2)]
    output = VarlenDocuments.build(LENGTHS, meta).attend(*qkv)
    assert output.shape == qkv[0].shape and output.dtype == torch.bfloat16
    output.sum().backward()
    assert all(x.grad.shape == x.shape for x in qkv)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
def test_documents_without_a_token(lengths):
    """Causal mixture-of-depths may admit no token. The kernel needs at least one document, even an empty one."""
    meta = torch.device("meta")
    documents = VarlenDocuments.build(lengths, torch.device("cpu"))
    assert documents.ends.tolist() == [0, 0] and documents.longest == 0
    qkv = [torch.empty(0, 2, 8, dtype=torch.bfloat16, device=meta, requires_grad=True) for _ in range(3)]
    output = VarlenDocuments.build(lengths, meta).attend(*qkv)
    assert output.shape == (0, 2, 8)
    output.sum().backward()


@pytest.mark.parametrize(
    ("device", "dtype", "varlen"),
    [("cuda", torch.bfloat16, True), ("cuda", torch.float32, False), ("cpu", torch.bfloat16, False)],
)
def test_flash_attention_is_for_cuda_in_half_precision(device, dtype, varlen, monkeypatch):
    for kind in (BucketedDocuments, VarlenDocuments):
        monkeypatch.setattr(kind, "build", lambda lengths, device, kind=kind: kind)
    chosen = locate_documents(LENGTHS, device=torch.device(device), dtype=dtype)
    assert (chosen is VarlenDocuments) == varlen
