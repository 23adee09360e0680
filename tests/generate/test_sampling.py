"""Sampling compared with plain Python: guidance, temperature, top-p, and draws that follow the probabilities."""

import math

import pytest
import torch

from moe_dist.core.errors import UserError
from moe_dist.core.seeding import fold_key
from moe_dist.core.strict import validate
from moe_dist.generate.sampling import Sampling, choose, guide, nucleus
from tests.support.routing_reference import splitmix_hash

SAMPLES, VOCABULARY = 6, 30


def naive_choice(logits, allowed, sampling, sample, position):
    """Draw one sample with Python floats."""
    ids = [i for i in range(len(logits)) if allowed[i]]
    if sampling.temperature == 0:
        return max(ids, key=lambda i: (logits[i], -i))
    highest = max(logits[i] for i in ids)
    weight = {i: math.exp((logits[i] - highest) / sampling.temperature) for i in ids}
    total = sum(weight.values())
    kept, reached = set(), 0.0
    for i in sorted(ids, key=lambda i: (-weight[i], i)):
        if reached >= sampling.top_p:
            break
        kept.add(i)
        reached += weight[i] / total
    draw = ((splitmix_hash(fold_key(sampling.seed, "sampling"), sample, position) >> 24) + 0.5) / 2**40
    rest = draw * sum(weight[i] for i in kept)
    for i in sorted(kept):
        rest -= weight[i]
        if rest < 0:
            return i
    raise AssertionError


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [1e-6, 0.4, 0.9, 1.0])
def test_choices_equal_plain_python(temperature, top_p):
    generator = torch.Generator().manual_seed(0)
    for trial in range(20):
        logits_SV = 2 * torch.randn(SAMPLES, VOCABULARY, generator=generator)
        allowed_SV = torch.rand(SAMPLES, VOCABULARY, generator=generator) < 0.6
        allowed_SV[:, 3] = True
        sampling = Sampling(temperature=temperature, top_p=top_p, seed=trial)
        sample_S, position_S = torch.arange(SAMPLES) + 7, torch.arange(SAMPLES) * 3
        chosen = choose(logits_SV, allowed_SV, sampling, sample_S, position_S).tolist()
        for s in range(SAMPLES):
            row = logits_SV[s].double().tolist()
            assert chosen[s] == naive_choice(row, allowed_SV[s].tolist(), sampling, s + 7, 3 * s), (trial, s)


def test_a_temperature_near_zero_is_greedy():
    logits_SV = torch.tensor([[9.0, -3.0, 9.5, 20.0]])
    allowed_SV = torch.tensor([[True, True, True, False]])
    for temperature in (1e-6, 1e-310):
        chosen = choose(logits_SV, allowed_SV, Sampling(temperature=temperature), torch.arange(1), torch.arange(1))
        assert chosen.tolist() == [2]


def test_the_nucleus_by_hand():
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=torch.float64)
    for top_p, kept in ((0.3, [1]), (0.4, [1]), (0.41, [1, 3]), (0.7, [1, 3]), (0.71, [1, 2, 3]), (1.0, [0, 1, 2, 3])):
        assert nucleus(probs, top_p)[0].nonzero().flatten().tolist() == kept, top_p
    ties = torch.full((1, 4), 0.25, dtype=torch.float64)
    assert nucleus(ties, 0.5)[0].tolist() == [0.25, 0.25, 0, 0]


def test_draws_follow_the_probabilities():
    probs = torch.tensor([0.5, 0.0, 0.2, 0.3])
    logits_SV = probs.log().expand(20_000, 4)
    allowed_SV = torch.tensor([True, True, True, False]).expand(20_000, 4)
    chosen_S = choose(logits_SV, allowed_SV, Sampling(), torch.arange(20_000), torch.zeros(20_000, dtype=torch.int64))
    shares = chosen_S.bincount(minlength=4) / 20_000
    expected = torch.tensor([5 / 7, 0, 2 / 7, 0])
    assert (shares - expected).abs().max() < 0.016  # five standard deviations
    assert shares[1] == shares[3] == 0


def test_guidance_is_the_papers_formula_and_scale_one_is_none():
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 3, 9, generator=generator, dtype=torch.float64)
    assert torch.equal(guide(logits, other, 1.0), logits)
    torch.testing.assert_close(guide(logits, other, 0.0), other)
    torch.testing.assert_close(guide(logits, other, 2.5), (1 + 1.5) * logits - 1.5 * other)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"temperature": -1.0}, "key 'temperature'"),
        ({"temperature": math.inf}, "key 'temperature'"),
        ({"guidance": math.inf}, "key 'guidance'"),
        ({"top_p": 0.0}, "key 'top_p'"),
        ({"top_p": 1.5}, "key 'top_p'"),
        ({"guidance": -2.0}, "key 'guidance'"),
        ({"max_tokens": 0}, "key 'max_tokens'"),
    ],
)
def test_bad_settings_are_named(setting, sentence):
    with pytest.raises(UserError, match=sentence):
        validate(Sampling, setting, "generate")
