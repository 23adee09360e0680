"""Selection keys against Python integers, and their breaking of ties."""

from dataclasses import replace

import pytest
import torch

from moe_dist.core.seeding import fold_key
from moe_dist.model.moe.router import selection_keys
from tests.support.model_batches import make_batch
from tests.support.routing_reference import selection_key

KEYS = [fold_key(0, f"layers.{layer}.ffn.router", "ties") for layer in range(3)]
STEP = 2.0**-14


def info_of(tokens, first_token_id=0):
    return make_batch([tokens], first_token_id=first_token_id).info


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_order_like_the_position_on_the_grid_and_then_the_hash(dtype):
    info = info_of(40, first_token_id=2**40)
    generator = torch.Generator().manual_seed(0)
    logits_VC = torch.randn(40, 3, generator=generator, dtype=dtype) * 3e-4
    logits_VC[:6] = torch.tensor([0.5, 1.5, -0.5, -2.5, 1.49, 0.0], dtype=dtype)[:, None] * STEP  # half to even
    logits_VC[6:12] = torch.tensor([255.99999, 256.0, 1e30, -256.0, -300.0, -torch.inf], dtype=dtype)[:, None]
    token_V, _ = info.competing()
    expected = {
        (v, c): selection_key(min(max(logits_VC[v, c].item(), -1e6), 1e6), int(info.token_id_T[token_V[v]]), c, KEYS[0])
        for v in range(40)
        for c in range(3)
    }
    keys_VC = selection_keys(logits_VC, info, KEYS[0])
    assert keys_VC.dtype == torch.int64
    assert sorted(expected, key=expected.__getitem__) == sorted(expected, key=lambda place: keys_VC[place].item())
    values = {place: (position << 40) + hashed for place, (position, hashed) in expected.items()}
    first = keys_VC[0, 0].item() - values[0, 0]
    assert {keys_VC[place].item() - value for place, value in values.items()} == {first}, "no more than a shift"


def test_ties_are_broken_by_token_column_and_router_alone():
    info, zeros = info_of(64), torch.zeros(64, 4)
    keys = selection_keys(zeros, info, KEYS[0])
    assert torch.equal(keys, selection_keys(zeros, info_of(64), KEYS[0]))
    assert torch.equal(keys[:, :2], selection_keys(zeros[:, :2], info, KEYS[0]))
    assert not (keys == selection_keys(zeros, info, KEYS[1])).any()
    other = replace(info, token_id_T=info.token_id_T + 64)
    assert not (keys == selection_keys(zeros, other, KEYS[0])).any()


def test_a_part_of_the_tokens_has_the_keys_that_they_had_among_all():
    info = make_batch([30, 34], padding=8, num_groups=2).info
    token_V, _ = info.competing()
    of_token = dict(zip(token_V.tolist(), selection_keys(torch.zeros(len(token_V), 4), info, KEYS[0]).tolist()))
    keep_T = info.valid_T & (info.token_id_T % 3 != 0)
    token_K, selected = info.select(keep_T, lambda counts: counts.tolist())
    parts = [(info.of_modality(1), None), (selected, token_K), (selected.of_modality(0), token_K)]
    for part, origin_K in parts:
        chosen_V, sizes = part.competing()
        keys = selection_keys(torch.zeros(sum(sizes), 4), part, KEYS[0]).tolist()
        tokens = (chosen_V if origin_K is None else origin_K[chosen_V]).tolist()
        assert tokens and keys == [of_token[token] for token in tokens]


def test_ties_are_broken_evenly_and_independently():
    """Among tied tokens, the choices of columns, routers and consecutive tokens behave like independent draws."""
    tokens, columns = 20_000, 8
    info = info_of(tokens)
    token_V, _ = info.competing()
    order_T = token_V.argsort()
    hashes = [selection_keys(torch.zeros(tokens, columns), info, key).double()[order_T] for key in KEYS]
    table = torch.cat(hashes, dim=1)
    table = torch.cat([table, table.roll(1, 0)], dim=1)  # the token before as well
    chosen = table >= table.quantile(0.75, dim=0)  # what a quarter of all would be chosen
    correlation = torch.corrcoef(chosen.double().t()).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / tokens**0.5
    correlation = torch.corrcoef(table.t()).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / tokens**0.5
    share = chosen[:, :columns].sum(1).bincount(minlength=columns + 1) / tokens  # binomial, were columns independent
    binomial = torch.distributions.Binomial(columns, torch.tensor(0.25)).log_prob(torch.arange(columns + 1.0)).exp()
    assert (share - binomial).abs().max() < 0.02
