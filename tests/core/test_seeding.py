"""Counter-based hashes against Python integers; initialisation by name."""

import pytest
import torch

from moe_dist.core.expert_rows import set_expert_ids
from moe_dist.core.seeding import _CHUNK as CHUNK
from moe_dist.core.seeding import dropout, fold_key, hash_ids, logistic, seeded_normal_, uniform
from tests.support.routing_reference import splitmix_hash


def test_hash_equals_splitmix_on_python_integers():
    tokens, experts = torch.tensor([0, 1, 12345, 2**40 + 7, -3]), torch.arange(3)
    key = fold_key(7, "layers.3.ffn.router", "ties")
    hashed = hash_ids(key, tokens[:, None], experts)
    expected = [[splitmix_hash(key, t, e) for e in range(3)] for t in tokens.tolist()]
    assert [[value % 2**64 for value in row] for row in hashed.tolist()] == expected


def test_published_splitmix_values():
    """The first outputs for seed 1234567, as public test vectors print them. The state advances by the golden ratio."""
    golden, seed = 0x9E3779B97F4A7C15, 1234567
    states = [(seed + i * golden) % 2**64 for i in range(3)]
    hashed = hash_ids(0, torch.tensor([state - 2**64 if state >> 63 else state for state in states]))
    assert [h % 2**64 for h in hashed.tolist()] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_keys_are_stable_over_runs_and_machines():
    assert fold_key(0, "name") == fold_key(0, "name") != fold_key(1, "name")
    assert fold_key(0, "ab", "c") != fold_key(0, "a", "bc")
    assert fold_key(0, "name") == 4736901192757521091


def test_uniform_numbers_are_40_bits_of_the_hash_and_never_0_or_1():
    tokens = torch.arange(-5, 50)
    expected = [((splitmix_hash(9, t) >> 24) + 0.5) / 2**40 for t in tokens.tolist()]
    assert uniform(9, tokens).tolist() == expected
    u = uniform(1, torch.arange(200_000))
    assert u.min() > 0 and u.max() < 1
    counts = (u * 20).long().bincount(minlength=20)
    assert ((counts - 10_000).abs() < 500).all()  # five standard deviations


def test_the_difference_of_two_gumbel_variables_is_logistic():
    token = torch.arange(100_000)
    gumbel = [-(-uniform(key, token).log()).log() for key in (1, 2)]
    levels = torch.linspace(0.02, 0.98, 13, dtype=torch.float64)
    ours, theirs = (sample.quantile(levels) for sample in (logistic(3, token), gumbel[0] - gumbel[1]))
    assert (ours - theirs).abs().max() < 0.12
    assert (ours - levels.logit()).abs().max() < 0.08


def test_initialisation_depends_on_name_and_seed_alone():
    first, second, third = (torch.empty(64, 64) for _ in range(3))
    seeded_normal_(first, seed=0, name="a", std=0.5)
    torch.randn(100)
    seeded_normal_(second, seed=0, name="a", std=0.5)
    seeded_normal_(third, seed=0, name="b", std=0.5)
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert abs(float(first.std()) - 0.5) < 0.02 and abs(float(first.mean())) < 0.02
    seeded_normal_(torch.empty(2, device="meta"), seed=0, name="a", std=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 31, CHUNK - 1, CHUNK, CHUNK + 15, CHUNK + 16, 3 * CHUNK + 7])
def test_initial_values_are_those_of_one_draw_of_torch(size, dtype):
    """Runs of earlier versions start from these values. Rows that are drawn in parallel are those drawn alone."""
    rows = torch.empty(3, size, dtype=dtype)
    set_expert_ids(rows, (5, 0, 2))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        seeded_normal_(rows, seed=3, name="x", std=0.02)
    finally:
        torch.set_num_threads(threads)
    for expert, row in zip((5, 0, 2), rows, strict=True):
        generator = torch.Generator().manual_seed(fold_key(3, "x", expert))
        assert torch.equal(row, (torch.randn(size, generator=generator) * 0.02).to(dtype))


def test_dropout_keeps_the_mean_and_decides_every_element_by_itself():
    x_RD = torch.ones(4096, 61)
    y_RD = dropout(x_RD, torch.arange(4096), key=3, rate=0.25)
    kept_RD = (y_RD > 0).double()
    assert torch.equal(y_RD.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert abs(kept_RD.mean().item() - 0.75) < 0.005
    assert (kept_RD.mean(0) - 0.75).abs().max() < 0.04 and (kept_RD.mean(1) - 0.75).abs().mean() < 0.06
    correlation = torch.corrcoef(kept_RD.t()) - torch.eye(61)
    assert correlation.abs().max() < 0.09  # 5.5 standard deviations of independent columns
    rows = torch.tensor([7, 99])
    assert torch.equal(dropout(x_RD[rows], rows, key=3, rate=0.25), y_RD[rows])
    assert not torch.equal(dropout(x_RD, torch.arange(4096), key=4, rate=0.25), y_RD)
